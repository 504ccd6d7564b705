"""Seconds of collectives by their bytes: alpha-beta, inside nodes and between them, on columns.

A group that spans nodes sums or gathers inside each node first, so that each device sends a part through its own port
(Thakur et al., "Optimization of collective communication operations in MPICH", 2005; NCCL's hierarchy).
"""

from dataclasses import dataclass

import numpy as np

from unisono.plan.constants import Constants
from unisono.plan.jobs import Column, Jobs, Mask


@dataclass(frozen=True, slots=True)
class Group:
    """Devices that exchange, of all rows.

    Attributes:
        size: of the group.
        inside: of them in a node.
    """

    size: Column
    inside: Column

    @property
    def nodes(self) -> Column:
        """Over which it is spread."""
        return np.ceil(self.size / self.inside)


def group(jobs: Jobs, size: Column, stride: Column) -> Group:
    """Devices whose ranks are ``stride`` apart."""
    return Group(size, np.clip(jobs.node / stride, 1, size))


def ring_bytes(devices: Column | float, size_bytes: Column | float) -> Column:
    """What each device sends as a ring sums so much for all; gathering or scattering is half of it.

    >>> float(ring_bytes(4, 100)), float(ring_bytes(1, 100))
    (150.0, 0.0)
    """
    return np.asarray(2 * (devices - 1) / devices * size_bytes)


def sum_seconds(jobs: Jobs, constants: Constants, members: Group, size_bytes: Column) -> Column:
    """Of summing so much for all members; a gather or a scatter is half of it."""
    within = ring_bytes(members.inside, size_bytes) / (jobs.within * constants.within)
    port = jobs.between * constants.between / (1 + constants.congestion * (members.nodes - 1))
    between = ring_bytes(members.nodes, size_bytes / members.inside) / port
    hops = np.where(members.nodes > 1, 2 * constants.hop_s * members.nodes, 0)
    return within + between + hops


def pass_seconds(jobs: Jobs, constants: Constants, is_near: Mask, size_bytes: Column) -> Column:
    """Of handing so much on to another device."""
    rate = np.where(is_near, jobs.within * constants.within, jobs.between * constants.between)
    return size_bytes / rate
