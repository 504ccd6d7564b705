"""A recorded run of workers that waited for nobody, done again by one worker, bit for bit."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from unisono.comm.host import HostGroup
from unisono.comm.partial import Partial
from unisono.engines.meeting import Done, MeetingEngine
from unisono.engines.units import Pace, UnitGradients, clipped_by
from unisono.errors import CheckpointError
from unisono.plan.pool import staleness
from unisono.plan.replay import Attempt, Read, replayed
from unisono.state.order import read_order, read_rounds
from unisono.sync.phases import Phases
from unisono.sync.pulled import PulledValues
from unisono.sync.server import Servers
from unisono.sync.sums import StepSums


class ReplayEngine(MeetingEngine):
    """Executes the steps of a run that is on record.

    Arguments:
        group: of one worker.
        units: computes gradients with ``values``.
        values: what the model computes with.
        new_values: makes memory for further ones.
        servers: what is updated.
        pace: how workers proceeded.
        recorded: the run's directory.
        snapshot: copies the state to where a checkpoint is written from.
    """

    def __init__(
        self,
        group: HostGroup,
        units: UnitGradients,
        values: PulledValues,
        new_values: Callable[[], PulledValues],
        servers: Servers,
        pace: Pace,
        recorded: Path,
        phases: Phases,
        snapshot: Callable[[], object],
    ) -> None:
        super().__init__(group, servers, phases, snapshot)
        self._servers = servers
        self._units = units
        self._values = values
        self._new_values = new_values
        self._pace = pace
        self._recorded = recorded
        self._free: list[PulledValues] = []

    def _do(self, step: int) -> Done:
        """Do a step (from 1) as it was done.

        Raises:
            CheckpointError: where it is not on record, or the state is not the one that it began with.
        """
        phases, servers = self._phases, self._servers
        order, recorded = read_order(self._recorded, step)
        self._refuse_other_servers(len(order), step)
        reads: dict[Attempt, PulledValues] = {}
        made: dict[Attempt, tuple[StepSums, float]] = {}
        sums: dict[int, tuple[float, float]] = {}
        begin = [servers.version_of(server) for server in range(len(order))]
        done = [0] * len(order)
        for action in replayed(order, [0] * len(order)):
            attempt = action.attempt
            if isinstance(action, Read):
                if attempt not in reads:
                    reads[attempt] = self._free.pop() if self._free else self._new_values()
                servers.pull_into(action.server, reads[attempt])
                continue
            if attempt not in made:
                self._values.take(reads[attempt])
                self._free.append(reads.pop(attempt))
                found = self._units.compute(step, attempt[0], phases)
                made[attempt] = found, clipped_by(self._pace.clip, found, servers, step)
                sums[attempt[0]] = found.loss, found.weight
                phases.enter("update")
            with torch.no_grad():
                at = begin[action.server] + done[action.server]
                servers.apply(action.server, action.entry, at, action.late, *made[attempt], step)
            done[action.server] += 1
            if action.server == len(order) - 1 and action.entry.stop == servers.runs[-1]:  # the last attempt of a unit
                what = f"push {attempt[0]} in step {step}"
                refuse_another_run(self._recorded, what, made[attempt][0], recorded[attempt[0]].tolist())
            if action.last:
                self._units.release(made.pop(attempt)[0])
        loss, weight = (sum(part) for part in zip(*sums.values(), strict=True))
        return Done(loss, weight, staleness(order, [0] * len(order)))

    def _refuse_other_servers(self, recorded: int, step: int) -> None:
        if recorded != len(self._servers.runs):
            raise CheckpointError(
                f"the run in {self._recorded} had {recorded} servers in step {step}, and here are "
                f"{len(self._servers.runs)}; set sync.servers as it was"
            )


class RoundsReplayEngine(MeetingEngine):
    """Executes the steps of a run that is on record and was done in rounds; arguments as of `ReplayEngine`."""

    def __init__(
        self,
        group: HostGroup,
        units: UnitGradients,
        servers: Servers,
        pace: Pace,
        recorded: Path,
        phases: Phases,
        snapshot: Callable[[], object],
    ) -> None:
        super().__init__(group, servers, phases, snapshot)
        self._servers = servers
        self._units = units
        self._pace = pace
        self._recorded = recorded
        self._memory: list[Sequence[Partial]] = []

    def _do(self, step: int) -> Done:
        """Do a step (from 1) as it was done.

        Raises:
            CheckpointError: where it is not on record, or this is another run.
        """
        phases, servers = self._phases, self._servers
        rounds, recorded = read_rounds(self._recorded, step)
        busy = np.zeros(servers.count, dtype=np.int64)
        for number, members in enumerate(rounds):
            servers.pull_all()
            sums = self._units.together([self._filled(step, i, unit) for i, unit in enumerate(members)])
            refuse_another_run(self._recorded, f"round {number} in step {step}", sums, recorded[number])
            factor = clipped_by(self._pace.clip, sums, servers, step)
            versions = [servers.version_of(server) for server in range(servers.count)]
            phases.enter("update")
            with torch.no_grad():
                servers.update_all(versions, busy, sums, factor, step, 0)
        loss, weight = (sum(part) for part in zip(*recorded, strict=True))
        return Done(loss, weight, {0: sum(map(len, rounds))})

    def _filled(self, step: int, number: int, unit: int) -> Partial:
        """A unit's gradient, in memory of its own."""
        if number == len(self._memory):
            self._memory.append(self._units.new_memory())
        return self._memory[number][self._units.fill(step, unit, self._memory[number], self._phases)]


def refuse_another_run(run_dir: Path, what: str, found: StepSums, recorded: Sequence[float]) -> None:
    """Check that a replay comes to what is on record.

    Raises:
        CheckpointError: where its loss or weight is another.
    """
    if (found.loss, found.weight) != tuple(recorded):
        raise CheckpointError(
            f"the loss of {what} is {found.loss!r}, and the run in {run_dir} had {recorded[0]!r}: this is another run; "
            "replay from its beginning, with its configuration and data, on the same kind of machine"
        )
