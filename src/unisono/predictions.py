"""A model's outputs for every sample of a dataset, as files that any number of workers write, the same on each.

A file holds the outputs of some batches, in order; an index, written last, says what there is. Whoever writes a file a
second time, in place of a worker that was lost, writes the same bytes.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from unisono.comm.group import Group
from unisono.data.feed import Feed
from unisono.errors import ConfigurationError, PredictionError
from unisono.evaluation import RANDOM_KEY, STOPPED, evaluating, shared_out
from unisono.parallel.replicated import Replica

INDEX = "index.json"
FORMAT = "unisono predictions 1"
FILES, MOST_BATCHES = 64, 64
"""About how many files there are, and the most batches of one: the same on any number of workers."""
Post = Callable[[Any], Any]
"""Output -> what is kept of it, the classes for example; a row for each sample."""


@dataclass(frozen=True, slots=True)
class Writer:
    """Writes a model's outputs, file by file.

    Arguments:
        feed: the samples.
        batch: samples computed at once; the last batch may be smaller.
        post: output -> what is kept of it.
    """

    replica: Replica
    feed: Feed
    directory: Path
    batch: int
    post: Post | None

    @property
    def each(self) -> int:
        """Samples of a file."""
        batches = -(-self.feed.size // self.batch)
        return self.batch * min(MOST_BATCHES, max(1, batches // FILES))

    def claim(self) -> None:
        """Make the directory.

        Raises:
            PredictionError: where it holds anything, or cannot be made.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if list(self.directory.glob("*.safetensors")) and not (self.directory / INDEX).exists():
                raise PredictionError(f"{self.directory} holds predictions that were not finished; remove it first")
            if any(self.directory.iterdir()):
                raise PredictionError(f"{self.directory} is not empty; give another directory for the predictions")
        except OSError as error:
            raise PredictionError(f"cannot write predictions into {self.directory}: {error.strerror}") from error

    def write_all(self, group: Group, stopping: Callable[[], bool]) -> list[dict[str, Any]] | None:
        """All files, whoever writes them: what each holds, in order. None where somebody was asked to stop.

        Raises:
            PredictionError: where they cannot be written.
            ConfigurationError: where the model's outputs have no row for each sample.
        """
        if group.rank == 0:
            self.claim()
        group.barrier("begin of the predictions")
        count = -(-self.feed.size // self.each)

        def write(numbers: Sequence[int]) -> bytes:
            made = []
            with self.replica.whole(), evaluating(self.replica.model):
                for number in numbers:
                    group.enter("validation", 0, number)
                    if stopping():
                        return STOPPED
                    made.append(self._write(number))
            return json.dumps(made).encode()

        said = shared_out(group, count, write, "predictions", at_once=1)
        files = None if said is None else [made for answer in said for made in json.loads(answer)]
        return None if files is None else sorted(files, key=lambda made: int(made["first"]))

    def _write(self, number: int) -> dict[str, Any]:
        first = number * self.each
        stop = min(first + self.each, self.feed.size)
        parts = [self._outputs(at, min(at + self.batch, stop)) for at in range(first, stop, self.batch)]
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        data = safetensors.torch.save(tensors)
        path = self.directory / f"{first:012d}.safetensors"
        whole = path.with_suffix(f".{os.getpid()}.part")
        try:
            with whole.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            whole.replace(path)
        except OSError as error:
            whole.unlink(missing_ok=True)
            raise PredictionError(f"cannot write {path}: {error.strerror}") from error
        about = [[name, str(t.dtype).removeprefix("torch."), list(t.shape[1:])] for name, t in tensors.items()]
        return {
            "file": path.name,
            "first": first,
            "samples": stop - first,
            "sha256": hashlib.sha256(data).hexdigest(),
            "tensors": about,
        }

    def _outputs(self, first: int, stop: int) -> dict[str, Tensor]:
        number = first // self.batch
        batch = self.feed.load(list(range(first, stop)), 0, f"batch {number} of the predictions")
        output = self.replica.output(RANDOM_KEY, number, batch)
        kept = output if self.post is None else self.post(output)
        found = named(kept)
        for name, tensor in found.items():
            if tensor.dim() == 0 or len(tensor) != stop - first:
                raise ConfigurationError(
                    f"{name} has the shape {tuple(tensor.shape)} for {stop - first} samples; "
                    "predictions have a row for each sample: return that from the model, or from a function of its "
                    "output"
                )
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    @staticmethod
    def names(files: Sequence[Mapping[str, Any]]) -> list[str]:
        """Of what there is for each sample."""
        return [name for name, _, _ in files[0]["tensors"]] if files else []

    def finish(self, files: Sequence[Mapping[str, Any]]) -> None:
        """Say what there is, once all of it is.

        Raises:
            PredictionError: where it is not.
        """
        away = [file["file"] for file in files if not (self.directory / file["file"]).exists()]
        if away:
            raise PredictionError(f"{away[0]} is not in {self.directory}; all hosts have to see the same directory")
        index = {"format": FORMAT, "samples": self.feed.size, "files": list(files)}
        path = self.directory / INDEX
        whole = path.with_suffix(".part")
        try:
            for leftover in self.directory.glob("*.part"):  # of workers that were lost
                leftover.unlink(missing_ok=True)
            whole.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
            whole.replace(path)
        except OSError as error:
            raise PredictionError(f"cannot write {path}: {error.strerror}") from error


def named(output: Any) -> dict[str, Tensor]:
    """The tensors of an output by name: "output" where it is one, keys or numbers where there are several.

    Raises:
        ConfigurationError: where it holds none.

    >>> list(named({"logits": torch.zeros(2, 3), "hidden": (torch.zeros(2), torch.zeros(2))}))
    ['logits', 'hidden.0', 'hidden.1']
    """
    if isinstance(output, Tensor):
        return {"output": output}
    leaves, _ = pytree.tree_flatten_with_path(output)
    found = {
        ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path): leaf
        for path, leaf in leaves
        if isinstance(leaf, Tensor)
    }
    if not found:
        raise ConfigurationError(f"the output is a {type(output).__name__} without a tensor; return tensors")
    return found


def read_predictions(directory: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All outputs that `Trainer.predict` or ``unisono predict`` has written, in the order of the samples.

    Raises:
        PredictionError: where they are not whole, or a file is not as it was written.
    """
    place = Path(directory)
    try:
        index = json.loads((place / INDEX).read_text(encoding="utf-8"))
        if index.get("format") != FORMAT:
            raise PredictionError(f"{place / INDEX} is not of this version: {index.get('format')!r}")
        parts = []
        for file in index["files"]:
            data = (place / file["file"]).read_bytes()
            if hashlib.sha256(data).hexdigest() != file["sha256"]:
                raise PredictionError(f"{place / file['file']} is damaged; write the predictions again")
            parts.append(safetensors.torch.load(data))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PredictionError(f"no whole predictions in {place}: {error}") from error
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
