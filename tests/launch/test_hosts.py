"""A run over several hosts, each with its own network: one digest, records on the first, one error for all."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.proxy import proxy
from unisono.bench.control import bench
from unisono.errors import UnisonoError
from unisono.launch.local import LocalLauncher
from unisono.launch.namespaces import Namespaces, unavailable
from unisono.launch.spanning import _without_hosts

SECRET = "a secret of twenty-four c"
SETTINGS = ["steps=6", "global_batch_size=24", "micro_batch_size=4", "validation.samples=16", "deadline_s=3"]
STOP = "fault.on_loss=stop"
CONFIG = Path(__file__).parents[2] / "configs" / "lm.yaml"
PORT = 29411


@pytest.fixture
def hosts() -> Iterator[Callable[..., Namespaces]]:
    """Makes hosts out of namespaces; skips where the machine forbids it."""
    reason = unavailable()
    if reason is not None:
        pytest.skip(f"no network namespaces: {reason}")
    with ExitStack() as stack:
        yield lambda *arguments: stack.enter_context(Namespaces(*arguments))


def command(number: int, nodes: int, address: str, *more: str) -> list[str]:
    own = ["--nnodes", str(nodes), "--node-rank", str(number), "--rendezvous", f"{address}:{PORT}", "--json"]
    return [sys.executable, "-m", "unisono", "train", str(CONFIG), *SETTINGS, *more, *own]


def start(
    words: list[str], tmp_path: Path, secret: str = SECRET, environment: Mapping[str, str] = os.environ
) -> subprocess.Popen[str]:
    environment = {**environment, "UNISONO_SECRET": secret, "PYTHONPATH": str(CONFIG.parents[1])}
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    )


def finish(processes: list[subprocess.Popen[str]], deadline_s: float = 60.0) -> list[tuple[int, str, str]]:
    results = []
    for process in processes:
        try:
            output, errors = process.communicate(timeout=deadline_s)
        except BaseException:
            for other in processes:
                other.kill()
                other.wait()
            raise
        results.append((process.returncode, output, errors))
    return results


def wait_for_listener(process: subprocess.Popen[str]) -> None:
    """Until somebody can connect to host 0."""
    until = time.monotonic() + 20
    while time.monotonic() < until and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", PORT), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError("host 0 does not listen")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of one worker on one host."""
    words = [sys.executable, "-m", "unisono", "train", str(CONFIG), *SETTINGS, "--json", "-n", "1"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path_factory.mktemp("alone"), check=True)
    digest: str = json.loads(done.stdout)["digest"]
    return digest


@pytest.mark.parametrize(
    ("sizes", "rate", "layout"),
    [
        ((1, 1), "100mbit", "layout.zero=null"),
        ((2, 1, 1), None, "layout.zero=null"),
        ((2, 4), "100mbit", "layout.pipeline=2"),
    ],
)
def test_one_digest_over_hosts_with_slow_links(
    hosts: Callable[..., Namespaces],
    sizes: tuple[int, ...],
    rate: str | None,
    layout: str,
    expected: str,
    tmp_path: Path,
) -> None:
    network = hosts(len(sizes), rate)
    processes = [
        start(network.words(i, [*command(i, len(sizes), network.addresses[0], layout), "-n", str(n)]), tmp_path)
        for i, n in enumerate(sizes)
    ]
    results = finish(processes)
    assert [code for code, _, _ in results] == [0] * len(sizes), results
    assert json.loads(results[0][1])["digest"] == expected
    assert [output for _, output, _ in results[1:]] == [""] * (len(sizes) - 1)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["lm-001"]


def test_a_cut_link_is_an_error_on_both_sides_that_names_the_other(
    hosts: Callable[..., Namespaces], tmp_path: Path
) -> None:
    network = hosts(2)
    words = [[*command(i, 2, network.addresses[0], "steps=100000", STOP), "-n", "1"] for i in range(2)]
    processes = [start(network.words(i, words[i]), tmp_path) for i in range(2)]
    wait_for_steps(tmp_path)
    network.cut(1)
    cut = time.monotonic()
    results = finish(processes)
    assert time.monotonic() - cut < 3 + 2 + 1  # the deadline, what may be added, and a process's end
    for i, (code, _, errors) in enumerate(results):
        assert code == 1
        assert f"rank {1 - i} (host {1 - i}) did not answer (deadline 3 s)" in errors, errors
        assert "of step" in errors and "Traceback" not in errors


def wait_for_steps(directory: Path) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        found = list(directory.glob("runs/*/events.jsonl"))
        if found and "RunStarted" in found[0].read_text():
            time.sleep(1.0)
            return
        time.sleep(0.05)
    raise AssertionError("training did not begin")


def test_a_killed_launcher_ends_all_hosts(tmp_path: Path) -> None:
    processes = [start([*command(i, 2, "127.0.0.1", "steps=100000", STOP), "-n", "1"], tmp_path) for i in range(2)]
    wait_for_steps(tmp_path)
    processes[1].send_signal(signal.SIGKILL)
    (code, _, errors), _ = finish(processes, 20)
    assert code == 1
    assert "host 1" in errors and "lost" in errors and "Traceback" not in errors


def test_a_killed_worker_is_named_on_all_hosts(tmp_path: Path) -> None:
    processes = [start([*command(i, 2, "127.0.0.1", "steps=100000", STOP), "-n", "1"], tmp_path) for i in range(2)]
    wait_for_steps(tmp_path)
    server = subprocess.run(["pgrep", "-P", str(processes[1].pid)], capture_output=True, text=True).stdout.split()[0]
    worker = subprocess.run(["pgrep", "-P", server], capture_output=True, text=True).stdout.split()[0]
    os.kill(int(worker), signal.SIGKILL)
    for code, _, errors in finish(processes, 20):
        assert code == 1
        assert "worker 1 of 2" in errors and "SIGKILL" in errors, errors


def test_an_interrupt_on_one_host_stops_all_in_good_order(tmp_path: Path) -> None:
    processes = [start([*command(i, 2, "127.0.0.1", "steps=100000"), "-n", "1"], tmp_path) for i in range(2)]
    wait_for_steps(tmp_path)
    processes[1].send_signal(signal.SIGINT)
    (first, output, _), (second, _, _) = finish(processes, 20)
    assert (first, second) == (130, 130)
    assert json.loads(output)["reason"] == "stopped"


def wait_for_event(directory: Path, name: str, **values: Any) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        lines = [line for path in directory.glob("runs/*/events.jsonl") for line in path.read_text().splitlines()]
        events = [json.loads(line) for line in lines if line.endswith("}")]
        if any(event["event"] == name and values.items() <= event.items() for event in events):
            return
        time.sleep(0.05)
    raise AssertionError(f"no {name} with {values}")


def test_a_host_comes_back_with_as_many_workers_as_it_had_or_not_at_all(tmp_path: Path) -> None:
    words = [[*command(i, 3, "127.0.0.1", "steps=100000"), "-n", "1"] for i in range(3)]
    processes = [start(own, tmp_path) for own in words]
    wait_for_steps(tmp_path)
    processes[2].kill()
    processes[2].communicate()
    wait_for_event(tmp_path, "HostsChanged", lost=[2])
    (code, _, errors), *_ = finish([start([*words[2], "-n", "2"], tmp_path)], 30)
    assert code == 2 and "it has 2 workers, and host 2 had 1 when the run began (-n)" in errors, errors
    processes[2] = start(words[2], tmp_path)
    wait_for_event(tmp_path, "HostsChanged", joined=[2])
    processes[1].send_signal(signal.SIGINT)
    results = finish(processes, 30)
    assert [code for code, _, _ in results] == [130] * 3
    assert "refused: it has 2 workers" not in results[0][2] + results[1][2]  # it concerns nobody else


def test_a_wrong_secret_is_refused_and_does_not_disturb_who_waits(tmp_path: Path) -> None:
    waiting = start([*command(0, 2, "127.0.0.1"), "-n", "1"], tmp_path)
    (code, _, errors), *_ = finish([start([*command(1, 2, "127.0.0.1"), "-n", "1"], tmp_path, "wrong" * 8)], 20)
    assert code == 2 and "same secret" in errors
    assert waiting.poll() is None, "a stranger must not disturb who waits"
    waiting.send_signal(signal.SIGINT)
    (code, _, errors), *_ = finish([waiting], 20)
    assert code == 130 and "Traceback" not in errors
    assert "127.0.0.1 was refused" in errors and errors.count("refused") == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGUSR1, 0)])
def test_a_launcher_that_waits_for_others_ends_when_it_is_asked_to(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """Started as shells start what runs in the background, too: with Ctrl-C ignored."""
    words = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", *command(0, 2, "127.0.0.1"), "-n", "1"]
    waiting = start(words, tmp_path)
    wait_for_listener(waiting)
    waiting.send_signal(number)
    (exit_code, _, errors), *_ = finish([waiting], 20)
    assert exit_code == code and "Traceback" not in errors, errors
    assert ("before any worker had begun" in errors) == (number != signal.SIGINT)


def test_a_crowd_of_launchers_reports_to_one_coordinator(pool: LocalLauncher) -> None:
    """What ``unisono bench control`` measures, small: nobody is taken for lost, and changes are told in batches."""
    found = bench(pool, launchers=70, workers=2, events=20, seconds=2.0)
    assert found["reports"] >= 2 * 70 and found["changes"] > 10
    assert 0 < found["generations_a_second"] <= 10


def test_a_run_that_differs_between_hosts_is_refused(tmp_path: Path) -> None:
    processes = [start([*command(i, 2, "127.0.0.1", f"seed={i}"), "-n", "1"], tmp_path) for i in range(2)]
    for code, _, errors in finish(processes, 30):
        assert code == 2 and "seed is 0 on rank 0 (host 0), 1 on rank 1 (host 1)" in errors, errors


def test_a_host_file_starts_the_others(tmp_path: Path, expected: str) -> None:
    (tmp_path / "hosts").write_text("localhost slots=1  # this one\n\n127.0.0.1 slots=2\n")
    words = [sys.executable, "-m", "unisono", "train", str(CONFIG), *SETTINGS, "--json", "--hosts", "hosts"]
    ((code, output, errors),) = finish([start(words, tmp_path)])
    assert code == 0, errors
    assert json.loads(output)["digest"] == expected


def test_other_hosts_are_reached_by_ssh_and_the_secret_is_no_argument(tmp_path: Path, expected: str) -> None:
    """A program of that name stands in for ssh: it notes its arguments and runs the command here."""
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nfor last; do :; done\nexec sh -c "$last"\n')
    program.chmod(0o755)
    words = [sys.executable, "-m", "unisono", "train", str(CONFIG), *SETTINGS, "--json", "--hosts", "hosts"]
    (tmp_path / "hosts").write_text(f"{own_address()} slots=1\nother.example slots=1\n")
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["digest"] == expected
    asked = (tmp_path / "asked").read_text()
    assert "other.example" in asked and "--node-rank 1" in asked and "read -r UNISONO_SECRET" in asked


def own_address() -> str:
    return subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()[0]


def test_torchrun_on_two_hosts(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from tests import jobs\n"
        "digest = jobs.trainer(model='norm', optimizer='momentum').fit(5).digest\n"
        "sys.stdout.write(f'digest {digest}\\n')\n"
    )
    common = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    where = ["--master-addr", "127.0.0.1", "--master-port", "29431"]
    processes = [start([*common, "--node-rank", str(i), *where, str(script)], tmp_path) for i in range(2)]
    processes.append(start([sys.executable, str(script)], tmp_path))
    results = finish(processes)
    assert [code for code, _, _ in results] == [0, 0, 0], results
    digests = {line for _, output, _ in results for line in output.split() if len(line) == 64}
    assert len(digests) == 1


def test_launchers_meet_over_a_link_with_delay_and_loss(tmp_path: Path, expected: str) -> None:
    with proxy(("127.0.0.1", PORT), delay_s=0.05, loss=0.2) as (address, port):
        near = start([*command(0, 2, "127.0.0.1"), "-n", "1"], tmp_path)
        words = [*command(1, 2, address), "-n", "1"]
        words[words.index("--rendezvous") + 1] = f"{address}:{port}"
        (code, output, errors), (other, _, _) = finish([near, start(words, tmp_path)])
    assert (code, other) == (0, 0), errors
    assert json.loads(output)["digest"] == expected


def test_bytes_at_the_interface_are_as_stated(hosts: Callable[..., Namespaces], tmp_path: Path) -> None:
    """Three hosts; a gradient of a square matrix, and of a bias, which travels as it is.

    A step sends about 5 KB besides (losses, counts, headers), in no formula. PowerSGD of rank 4 sends so little of the
    smaller matrix that this shows; so it has a larger one.
    """
    n, width = 3, 1600
    both_ways, plain = 2 * (n - 1) / n, {"lossless": "never"}

    def stated(matrix: Callable[[int], float], width: int = width) -> float:
        return both_ways * (matrix(width**2) + 4 * width)

    cases: dict[str, tuple[int, int, dict[str, Any], float]] = {
        "ring": (width, 3, {"algorithm": "ring", **plain}, stated(lambda w: 4 * w)),
        "canonical, aligned": (width, 6, plain, stated(lambda w: 4 * w)),
        "canonical, two partials": (width, 9, plain, (1 + 2) / 2 * stated(lambda w: 4 * w)),
        "bf16": (width, 3, {"compression": "bf16"}, stated(lambda w: 2 * w)),
        "fp16": (width, 3, {"compression": "fp16"}, stated(lambda w: 2 * w)),
        "int8": (width, 3, {"compression": "int8"}, stated(lambda w: (1 + 4 / 512) * w)),
        "sign": (width, 3, {"compression": "sign"}, stated(lambda w: (1 / 8 + 4 / 1024) * w)),
        "top_k": (
            width,
            3,
            {"compression": "top_k", "density": 0.01, "warmup_steps": 0},
            stated(lambda w: n / 2 * 8 * 0.01 * w),
        ),
        "powersgd": (2 * width, 3, {"compression": "powersgd"}, stated(lambda w: 4 * 4 * 2 * w**0.5, 2 * width)),
    }
    packed = {"lossless": "always"}
    wanted = [
        {"name": name, "width": wide, "micro_batches": count, "wire": wire}
        for name, (wide, count, wire, _) in {**cases, "packed": (width, 6, packed, 0.0)}.items()
    ]
    network = hosts(n)
    processes = []
    for number in range(n):
        words = network.words(number, [sys.executable, "-m", "tests.wire_bytes", json.dumps(wanted)])
        processes.append(start(words, tmp_path, environment=network.environment(number, PORT)))
    ended = finish(processes)
    for code, _, errors in ended:
        assert code == 0, errors
    measured = json.loads(ended[0][1])
    assert measured.pop("packed") < 0.9 * cases["canonical, aligned"][-1]
    for name, case in cases.items():
        assert measured[name] == pytest.approx(case[-1], rel=0.05), name


def test_the_command_for_other_hosts_leaves_a_scripts_words_alone() -> None:
    words = ["run", "--hosts", "file", "-n", "3", "-n4", "--workers=2", "./script.py", "-n", "5", "--json"]
    assert _without_hosts(words, 3) == ["run", "./script.py", "-n", "5", "--json"]


@pytest.mark.parametrize(
    ("workers", "hosts", "options", "expected"),
    [
        (4, 2, {"layout": {"zero": 3}}, "layout.zero is 3 over 2 hosts of up to 2 workers; between hosts of several"),
        (
            2,
            2,
            {"layout": {"zero": 1}, "wire": {"compression": "int8"}},
            "zero is 1 over 2 hosts, and int8 loses",
        ),
        (
            2,
            2,
            {"layout": {"tensor": 2}},
            "1 worker on host 0 cannot make replicas of 2 (layout.pipeline=1, layout.tensor=2); use 2 workers there",
        ),
        (
            2,
            2,
            {"layout": {"zero": 3}, "model": "untouched", "global_batch_size": 24},
            "use layout.zero=2, or let that code not look at values",
        ),
    ],
)
def test_hosts_that_cannot_train_together_say_why(
    pool: LocalLauncher, workers: int, hosts: int, options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UnisonoError) as caught:
        pool.run({"call": "tests.jobs:train", "arguments": options}, workers, hosts=hosts)
    assert expected in str(caught.value) and "Traceback" not in str(caught.value), caught.value
