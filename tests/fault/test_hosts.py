"""Hosts that are killed, stopped or cut off in the middle of a run: the others go on, with the same bits."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from unisono import assembly
from unisono.check.host_chaos import FAULTS, HostChaos, Hosts, Watching
from unisono.check.observed import Observed, Row
from unisono.check.strike import Strike
from unisono.check.trials import arguments
from unisono.config import Config, validate
from unisono.fault.generation import Acceptor, Generation
from unisono.launch.channel import Channel, Role
from unisono.launch.ledger import Ledger
from unisono.launch.namespaces import unavailable
from unisono.launch.witness import Witness
from unisono.launch.world import this_process
from unisono.tasks.images import Images

CONFIG = {
    "task": "images",
    "options": {"width": 128},
    "steps": 30,
    "global_batch_size": 256,  # steps that last: a fault must come before the end
    "micro_batch_size": 32,
    "clip": 1.0,
}
DILOCO = {"mode": "diloco", "period": 4, "after": 4, "replicas": 4}
ROUNDS = {"mode": "server", "staleness": 0, "accepted": 3}
NEED_LINKS = ("cut-coordinator", "cut-halves", "cut-halves-witness")


def struck(fault: str, workers: int = 1, repeat: int = 1, /, **settings: Any) -> Row:
    config = validate(Config, {**CONFIG, **settings}, "test")
    return HostChaos(config, workers, repeat, lambda text: None).run(fault)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("coordinator", "coordinator-stopped")]


@pytest.mark.parametrize("fault", ["host-worker", "host-workers", "host", "host-again", "coordinator-again", *SLOW])
def test_the_others_go_on_with_the_same_bits(fault: str) -> None:
    of_workers = fault.startswith("host-worker")
    row = struck(fault, 2 if of_workers else 1, 2 if of_workers else 1)
    assert row.good, row.as_text()
    assert row.recovery_s


@pytest.mark.parametrize(
    ("fault", "workers", "settings"),
    [
        ("host-worker", 2, {"layout": {"zero": 1}}),
        ("host", 1, {"layout": {"zero": 3}}),
        ("coordinator", 1, {"layout": {"zero": 2}}),
        ("host-again", 1, {"layout": {"zero": 1}}),
        ("host-witness", 2, {"layout": {"pipeline": 2}}),
        ("host", 1, {"sync": DILOCO}),
        ("host-again", 1, {"sync": {**DILOCO, "fragments": 2, "delay": 1}}),
        ("host", 1, {"sync": ROUNDS}),
        ("host-worker", 2, {"sync": ROUNDS}),
        pytest.param("host-fenced", 1, {"layout": {"zero": 3}}, marks=pytest.mark.slow),
        pytest.param("host-worker", 4, {"layout": {"pipeline": 2, "zero": 1}}, marks=pytest.mark.slow),
        pytest.param("host-worker", 2, {"sync": DILOCO}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_where_nobody_can_take_over_all_hosts_start_again(fault: str, workers: int, settings: dict[str, Any]) -> None:
    """From what each has kept, and its neighbour's; at most what came after the last snapshot is trained again."""
    further = {"options": {"width": 32}, "fault": {"snapshot_every": 3}}
    row = struck(fault, workers, 2 if fault == "host-worker" else 1, **settings, **further)
    assert row.good and row.starts_again and row.may_lose == 3, row.as_text()
    assert row.recovery_s


@pytest.mark.parametrize("fault", ["host-witness", "host-fenced"])
def test_half_of_the_hosts_goes_on_with_a_witness_or_a_proof(fault: str) -> None:
    row = struck(fault)
    assert row.good, row.as_text()


@pytest.mark.slow
@pytest.mark.parametrize("fault", NEED_LINKS)
def test_who_is_cut_off_commits_nothing_and_comes_back(fault: str) -> None:
    reason = unavailable()
    if reason is not None:
        pytest.skip(f"no network namespaces: {reason}")
    row = struck(fault)
    assert row.good, row.as_text()


def test_workers_of_hosts_are_lost_in_evaluations_too(tmp_path: Path) -> None:
    """Every evaluation has the figures of the undisturbed run, and is on record once."""
    config = validate(Config, {**CONFIG, "options": {"width": 32}}, "test")

    def trained(name: str, strikes: list[Strike]) -> tuple[set[str], dict[int, Any]]:
        directory = tmp_path / name
        directory.mkdir()
        settings = {"validation": {"every": 4, "metric": "loss"}, "deadline_s": 20.0}
        with Hosts(2, 2, None, False, directory) as run:
            run.start(arguments(config, 13, str(directory), strikes, None, settings, False))
            watch = Watching(run, Observed())
            watch.until_over()
            said = run.said()
            watch.look()
        found = watch.seen.of("ValidationFinished")
        assert [record["step"] for record in found] == [4, 8, 12, 13]
        assert len([note for host in said for note in host["strikes"]]) == len(strikes)
        return {host["result"]["digest"] for host in said}, {record["step"]: record["metrics"] for record in found}

    expected = trained("undisturbed", [])
    assert len(expected[0]) == 1
    assert trained("struck", [Strike(3, 4, "validation"), Strike(0, 8, "validation")]) == expected  # one is the chief
    assert trained("late", [Strike(2, 13, "validation")]) == expected  # nobody takes its place before the end


class Dying(Images):
    """A task of which a worker ends as it gives the state its first values, once."""

    def model(self) -> nn.Module:
        mark, world = Path(os.environ["UNISONO_TEST_MARK"]), this_process()
        if world.rank == world.size - 1 and not mark.exists():
            mark.touch()
            vars(assembly)["fill"] = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        return super().model()


def test_who_comes_back_in_the_middle_of_an_evaluation_takes_part_in_it(tmp_path: Path) -> None:
    """With one after every step, there is hardly another moment to come in."""
    config = validate(Config, {**CONFIG, "options": {"width": 32}}, "test")
    strikes = [Strike(2, 2, "backward"), Strike(3, 2, "backward"), Strike(0, 4, "validation")]
    with Hosts(2, 2, None, False, tmp_path) as run:
        settings = {"validation": {"every": 1, "metric": "loss"}, "deadline_s": 20.0}
        run.start(arguments(config, 90, str(tmp_path), strikes, None, settings, False))
        watch = Watching(run, Observed())
        watch.until_over()
        said = run.said()
        watch.look()
    assert [record["step"] for record in watch.seen.of("ValidationFinished")] == list(range(1, 91))
    assert len({host["result"]["digest"] for host in said}) == 1
    assert "2 workers of host 0" in run.log(0) and "host 1 joined" in run.log(0)


def test_who_was_away_during_evaluations_goes_on_from_where_the_others_are(tmp_path: Path) -> None:
    """Its launcher is stopped: the others go on without it, and its workers are in the middle of something."""
    config = validate(Config, {**CONFIG, "options": {"width": 32}}, "test")
    digests = []
    for hosts, away in ((1, 0), (3, 1)):
        directory = tmp_path / str(hosts)
        directory.mkdir()
        with Hosts(hosts, 1, None, False, directory) as run:
            settings = {"validation": {"every": 1, "metric": "loss"}, "deadline_s": 20.0}
            run.start(arguments(config, 200, str(directory), [], None, settings, False))
            watch = Watching(run, Observed())
            watch.until(5)
            for _ in range(away):
                run.send(2, signal.SIGSTOP)
                watch.rest(2.5)
                run.send(2, signal.SIGCONT)
                watch.all_together(3)
            watch.until_over()
            digests += [host["result"]["digest"] for host in run.said()]
            watch.look()
        assert [record["step"] for record in watch.seen.of("ValidationFinished")] == list(range(1, 201))
        assert len(watch.seen.of("HostsChanged")) >= 2 * away
    assert len(set(digests)) == 1


def test_a_worker_lost_before_training_starts_all_hosts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNISONO_TEST_MARK", str(tmp_path / "mark"))
    config = validate(Config, {**CONFIG, "task": f"{__name__}:Dying", "steps": 6, "layout": {"zero": 1}}, "test")
    with Hosts(2, 1, None, False, tmp_path) as run:
        run.start(arguments(config, 6, str(tmp_path), [], None, {"deadline_s": 20.0}, False))
        Watching(run, Observed()).until_over()
        said = run.said()
    assert (tmp_path / "mark").exists()
    assert {host["result"]["step"] for host in said} == {6} and len({host["result"]["digest"] for host in said}) == 1


class Changed(Images):
    """A task that is another one by the time that lost workers start again."""

    def definition(self) -> dict[str, bool]:
        return {"joins": this_process().joins}

    def model(self) -> nn.Module:
        return super().model() if not this_process().joins else nn.Linear(1, 1)


def test_workers_that_would_train_something_else_may_not_join_and_the_others_go_on(tmp_path: Path) -> None:
    config = validate(Config, {**CONFIG, "task": f"{__name__}:Changed", "steps": 12}, "test")
    strikes = [Strike(1, 4, "backward")]
    with Hosts(2, 1, None, False, tmp_path) as run:
        run.start(arguments(config, 12, str(tmp_path), strikes, None, {}, False))
        until = time.monotonic() + 60
        while not run.over() and time.monotonic() < until:
            time.sleep(0.02)
        here, refused = run.said()
    assert here["result"]["step"] == 12 and here["result"]["reason"] == "finished"
    assert "cannot join" in refused["error"] and "made of something else" in refused["error"]


def test_every_fault_of_hosts_has_its_method() -> None:
    assert all(hasattr(HostChaos, f"_{name.replace('-', '_')}") for name in FAULTS)


def test_a_witness_stands_by_its_vote_after_it_has_started_again(tmp_path: Path) -> None:
    run, first, second = "0123456789abcdef", Generation.first([1, 1]), Generation(2, (0,), ((0,),), 0)
    told: list[str] = []

    def ask(number: int, *messages: Mapping[str, object]) -> list[dict[str, object]]:
        """Speak to a witness that has just started."""
        witness = Witness(b"a secret of job", tmp_path, told.append)
        port = witness.listen("127.0.0.1", 0)
        channel, answers = Channel(b"a secret of job", Role.CLIENT), []
        with socket.create_connection(("127.0.0.1", port)) as line:
            line.settimeout(0.05)
            for turn in range(12):
                if channel.established and turn > 4 and messages:
                    for message in ({"op": "hail", "number": number, "run": run}, *messages):
                        channel.send(dict(message))
                    messages = ()
                line.sendall(channel.take())
                witness.turn(0.05)
                try:
                    answers += channel.feed(line.recv(1 << 16))
                except TimeoutError:
                    continue
        witness.close()
        return answers

    known = {"op": "generation", "generation": first.written()}
    prepare = {"op": "prepare", "number": 2, "ballot": [1, 0]}
    accept = {"op": "accept", "change": second.change(first), "ballot": [1, 0]}
    answers = ask(0, prepare, known, prepare, accept)
    assert [answer["op"] for answer in answers] == ["refused", "promise", "accepted"]
    assert answers[0]["knows"] == 0, "it has not heard of the run before, and is told"
    (answer,) = ask(1, {"op": "prepare", "number": 2, "ballot": [2, 1]})
    assert answer["accepted"] == {"ballot": [1, 0], "change": second.change(first)}, "host 1 must bring this about"
    assert [path.name for path in tmp_path.iterdir()] == [f"{run}.json"]
    assert ask(0, {"op": "what"}) == []  # no launcher says that: the line is closed, and the vote stands
    assert json.loads((tmp_path / f"{run}.json").read_text())["promised"] == [2, 1]


def test_a_launcher_stands_by_the_votes_of_the_one_before_and_of_no_other_run(tmp_path: Path) -> None:
    path, first, second = tmp_path / "host-1.json", Generation.first([1, 1, 1]), Generation(2, (1, 2), ((0,), (0,)), 1)
    before = Acceptor(first, Ledger(path, "a"))
    assert before.promise(2, (3, 1)) and before.accept((3, 1), second)
    assert Ledger(run="b").read(path) is None and Ledger(run="a").read(tmp_path / "none.json") is None
    record = Ledger(run="a").read(path)
    assert record is not None
    again = Acceptor(first, Ledger(run="a"))
    again.resume(Acceptor.read(record, again.keep))
    assert again.accepted == ((3, 1), second) and not again.promise(2, (2, 0))
    later = Acceptor(second, Ledger(run="a"))  # the others have told it of what was decided meanwhile
    later.resume(Acceptor.read(record, later.keep))
    assert later.current == second and later.accepted is None and later.promised == (3, 1)


def test_a_vote_that_cannot_be_kept_is_not_given(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "host-0.json")
    acceptor = Acceptor(Generation.first([1, 1, 1]), ledger)
    assert acceptor.promise(2, (1, 1))
    ledger.path = tmp_path / "gone" / "host-0.json"
    assert not acceptor.promise(2, (2, 2)) and acceptor.promised == (1, 1)
    assert not acceptor.accept((3, 1), Generation(2, (1,), ((0,),), 1)) and acceptor.accepted is None


def test_too_few_hosts_end_the_run_where_that_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps({**CONFIG, "steps": 100_000, "fault": {"on_tie": "stop"}}))
    environment = {**os.environ, "UNISONO_SECRET": "a secret of twenty-four c"}
    words = [
        sys.executable,
        "-m",
        "unisono",
        "train",
        "config.yaml",
        "run_dir=run",
        "-n",
        "1",
        "--nnodes",
        "2",
        "--json",
    ]
    processes = [
        subprocess.Popen(
            [*words, "--node-rank", str(number), "--rendezvous", "127.0.0.1:29433"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        until = time.monotonic() + 40
        events = tmp_path / "run" / "events.jsonl"
        while time.monotonic() < until and not (events.exists() and "StepFinished" in events.read_text()):
            time.sleep(0.05)
        time.sleep(0.5)
        processes[0].send_signal(signal.SIGKILL)
        _, errors = processes[1].communicate(timeout=30)
        assert processes[1].returncode == 1
        assert "too few to decide who goes on: without host 0" in errors and "fault.on_tie=stop" in errors, errors
        assert "Traceback" not in errors
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_fence_without_a_run_is_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "unisono", "fence", "1", str(tmp_path)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2 and "no run over several hosts is at work" in done.stderr
