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

import pytest
from torch import nn

from unisono.check.host_chaos import FAULTS, HostChaos, Hosts
from unisono.check.observed import Row
from unisono.check.strike import Strike
from unisono.check.trials import arguments
from unisono.config import Config, validate
from unisono.errors import ConfigurationError
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
NEED_LINKS = ("cut-coordinator", "cut-halves", "cut-halves-witness")


def struck(fault: str, workers: int = 1, repeat: int = 1) -> Row:
    config = validate(Config, CONFIG, "test")
    return HostChaos(config, workers, repeat, lambda text: None).run(fault)


SLOW = [pytest.param("coordinator-stopped", marks=pytest.mark.slow)]


@pytest.mark.parametrize("fault", ["host-worker", "host-workers", "host", "host-again", "coordinator", *SLOW])
def test_the_others_go_on_with_the_same_bits(fault: str) -> None:
    of_workers = fault.startswith("host-worker")
    row = struck(fault, workers=2 if of_workers else 1, repeat=2 if of_workers else 1)
    assert row.good, row.as_text()
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
    with pytest.raises(ConfigurationError):
        from unisono.check.host_chaos import chosen_host_faults

        chosen_host_faults("comet")
