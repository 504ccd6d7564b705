"""Every exception a user can meet, as a small tree.

An error says what was asked, what was found, what is allowed and what to do next. ``exit_code`` is what a command
ends with: 2 where the user's input was wrong, 1 where the user's own code or a worker failed.
"""

from collections.abc import Mapping
from typing import Any


class UnisonoError(Exception):
    """The root: catch it to catch everything that Unisono raises on purpose."""

    exit_code = 2


class ConfigurationError(UnisonoError):
    """What the user described cannot be trained: the sentence says what was given and what is allowed."""


class DataError(UnisonoError):
    """A dataset cannot be read, is empty, or returns something that cannot be batched."""


class TrainingError(UnisonoError):
    """A step's result cannot be used, a loss that is not a number for example."""


class ImpureRunError(TrainingError):
    """The same micro-batch, computed twice from the same state, gave two results."""


class SilentCorruption(TrainingError):
    """Two workers computed the same micro-batch from the same state, and not the same gradient."""

    exit_code = 1


class CheckpointError(UnisonoError):
    """A checkpoint cannot be written, or none that is intact can be read."""


class PredictionError(UnisonoError):
    """Predictions cannot be written, or those that were are not whole."""


class RecordError(UnisonoError):
    """The records of a run cannot be written."""


class LaunchError(UnisonoError):
    """Workers cannot be started or found."""


class GroupError(UnisonoError):
    """Workers cannot go on together."""

    exit_code = 1


class WaitTimeout(GroupError):
    """A wait passed its deadline: the sentence names the missing ranks, the operation and the waiting line."""


class Revoked(GroupError):
    """The group's generation ended while this worker waited: someone else holds the cause."""


class PeerLost(GroupError):
    """A worker of another host ended, or the link to it was cut, in the middle of an exchange."""


class Regrouped(GroupError):
    """Other hosts than before train on: what was under way between hosts is to be done again.

    Attributes:
        step: the last that is committed everywhere.
        known: what the host that is farthest says of it.
    """

    def __init__(self, step: int, known: Mapping[str, Any]) -> None:
        super().__init__(f"other hosts than before go on from step {step}")
        self.step = step
        self.known = known


class RunOver(GroupError):
    """Training ended while this worker, which was to replace another, waited to be let in."""


class ReplicaBroken(GroupError):
    """A worker that computes together with this one is lost: what they have not published is computed by others."""


class HostLeaves(UnisonoError):
    """The workers of this host cannot go on, or may not join; those of the others train on."""

    exit_code = 1


class WorkerFailed(UnisonoError):
    """A worker ended in an exception or was lost; the message carries its rank and its traceback."""

    exit_code = 1
