"""What one worker does in a round where servers are spread: it asks for units, and brings those that count."""

from collections.abc import Sequence

from unisono.comm.calls import Asking
from unisono.sync.brought import BRING, Brought, Need
from unisono.sync.claims import GivesRounds
from unisono.sync.round_updates import RoundUpdates


class Part:
    """One worker's part in rounds.

    Arguments:
        claims: decides what counts.
        brought: of this host.
        updates: that this worker makes; None where it does not reach the servers of its host.
        elsewhere: of each worker that it asks, what that one's host needs.
    """

    def __init__(
        self,
        claims: GivesRounds,
        brought: Brought,
        updates: RoundUpdates | None,
        elsewhere: Sequence[tuple[Asking, Need]],
    ) -> None:
        self.claims = claims
        self._brought = brought
        self._updates = updates
        self._elsewhere = elsewhere

    def bring(self, step: int, number: int, unit: int, entry: int) -> None:
        """A unit that counts in a round lies in one of this worker's buffers."""
        operation, brought = f"unit {unit} of round {number} of step {step}", self._brought
        partial = brought.view(brought.slot, entry)
        for asking, need in self._elsewhere:
            about = {"op": BRING, "step": step, "round": number, "unit": unit}
            asking.ask(operation, about, list(need.views(partial)))
        if self._updates is not None and brought.bring(step, number, unit, entry):
            self._updates.end(step, number)
        for asking, _ in self._elsewhere:
            asking.answer(operation)
