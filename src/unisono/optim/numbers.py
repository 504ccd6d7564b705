"""What optimizers keep that is no tensor: plain numbers, as bytes of the training state."""

import json
from typing import Any

from torch.optim import Optimizer

from unisono.errors import TrainingError

WORD = 8


class Numbers:
    """Those of one optimizer.

    Arguments:
        constructed: the optimizer as its user made it.
        memory: where they lie.
    """

    def __init__(self, constructed: Optimizer, memory: memoryview) -> None:
        self._constructed = constructed
        self._memory = memory

    def read(self) -> dict[str, Any]:
        """Of groups, and of parameters by name (``state``)."""
        size = int.from_bytes(self._memory[:WORD], "little")
        if not size:
            return {"groups": [{}] * len(self._constructed.param_groups), "state": {}}
        stored: dict[str, Any] = json.loads(bytes(self._memory[WORD : WORD + size]))
        return stored

    def load(self, optimizer: Optimizer) -> dict[str, Any]:
        """Let an optimizer's groups have their numbers; those of parameters."""
        stored = self.read()
        for group, values in zip(optimizer.param_groups, stored["groups"], strict=True):
            group.update(values)
        of_parameters: dict[str, Any] = stored["state"]
        return of_parameters

    def keep(self, optimizer: Optimizer, of_parameters: dict[str, Any] | None = None) -> None:
        """Keep the numbers of an optimizer's groups that have changed, and some of parameters.

        Raises:
            TrainingError: where there is no room for them.
        """
        pairs = zip(optimizer.param_groups, self._constructed.param_groups, strict=True)
        stored = {
            "groups": [
                {key: value for key, value in numbers(group).items() if key != "lr" and before.get(key) != value}
                for group, before in pairs
            ],
            "state": {**self.read()["state"], **(of_parameters or {})},
        }
        data = json.dumps(stored, sort_keys=True).encode()
        if len(data) + WORD > len(self._memory):
            raise TrainingError(
                f"optimizer {type(optimizer).__name__} keeps {len(data)} bytes of numbers that are not tensors; "
                f"at most {len(self._memory) - WORD} can be kept: make them tensors"
            )
        self._memory[WORD : WORD + len(data)] = data
        self._memory[:WORD] = len(data).to_bytes(WORD, "little")


def numbers(values: dict[str, Any]) -> dict[str, Any]:
    """The plain numbers among some values."""
    return {key: value for key, value in values.items() if isinstance(value, int | float | bool) and key != "params"}
