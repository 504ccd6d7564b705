"""A host of a run that chaos strikes: a launcher of its own, told over its input what to do; what it saw is printed.

A program: ``python -m unisono.check.one_host``, with one JSON object (`Order`) on its input.
"""

import json
import os
import sys
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from unisono.comm.header import Course
from unisono.errors import UnisonoError
from unisono.launch.local import LocalLauncher
from unisono.launch.nodes import Nodes, Rendezvous
from unisono.launch.process import die_with_parent
from unisono.launch.task import STANDARD_ERROR
from unisono.launch.worker_set import WorkerSet


@dataclass(frozen=True, slots=True)
class Order:
    """What a host is told.

    Attributes:
        number, hosts: which one it is, of how many.
        workers: that it has.
        address, port: where host 0 listens.
        witness: where one does; None for none.
        secret: the job's.
        arguments: of `check.strike.train`.
    """

    number: int
    hosts: int
    workers: int
    address: str
    port: int
    witness: tuple[str, int] | None
    secret: str
    arguments: dict[str, Any]


def run(order: Order) -> dict[str, Any]:
    """Train; the result, what workers told as they were struck, and the processes that trained and ended meanwhile."""
    where = Rendezvous(order.address, order.port, order.hosts, order.number, order.secret.encode(), 60.0, order.witness)
    nodes = Nodes(where, version("unisono"))
    strikes: list[dict[str, Any]] = []
    ended: set[int] = set()
    before: dict[int, int] = {}

    def turn(workers: WorkerSet) -> None:
        strikes.extend(note for note in workers.notes if note not in strikes)
        header = workers.survival.header
        if header is None or header.course is not Course.TRAINING:
            return
        alive = {w.rank: w.process for w in workers.alive if workers.survival.trains(w.rank)}
        ended.update(process for rank, process in before.items() if alive.get(rank) != process)
        before.clear()
        before.update(alive)

    with LocalLauncher(nodes=nodes) as launcher:
        if order.number == 0:
            nodes.run_dir = order.arguments["config"]["run_dir"]
        launcher.each_turn = turn
        target = {"call": "unisono.check.strike:train", "arguments": order.arguments}
        seen: dict[str, Any] = {"strikes": strikes}
        try:
            seen["result"] = launcher.run(target, order.workers, output=STANDARD_ERROR).result
        except UnisonoError as error:
            seen["error"] = str(error)
        return {**seen, "ended": sorted(ended)}


def main() -> None:
    """Read the order, and print what was seen; who is ended without a word takes its hosts along."""
    die_with_parent(os.getppid())
    given = json.loads(sys.stdin.readline())
    order = Order(**{**given, "witness": tuple(given["witness"]) if given["witness"] else None})
    sys.stdout.write(json.dumps(run(order)) + "\n")


if __name__ == "__main__":
    main()
