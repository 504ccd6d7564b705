"""The command line as a user meets it: help, wrong input, training, verification, checkpoints."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = """
task: images
options: {width: 4}
steps: 4
global_batch_size: 28
micro_batch_size: 4
validation: {samples: 40}
"""
TASK = """
import torch
from torch import nn
class Task:
    def __init__(self, fault=None): self.fault = fault
    def model(self): print("a word of the user's"); return nn.Linear(2, 1)
    def dataset(self, split):
        class Data:
            fault = self.fault
            def __len__(self): return 0 if self.fault == "empty" else 50
            def __getitem__(self, i):
                if self.fault == "item" and torch.distributed is not None and __import__("os").environ["RANK"] == "1":
                    raise RuntimeError("cannot decode this image")
                return torch.ones(2), torch.ones(1)
        return Data() if split == "train" else None
    def loss(self, output, target):
        value = nn.functional.mse_loss(output, target)
        return value * float("nan") if self.fault == "nan" else value
    def optimizer(self, parameters): return torch.optim.SGD(parameters, lr=0.1)
"""


def unisono(*arguments: str, cwd: Path = ROOT, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "unisono", *arguments],
        capture_output=True, text=True, cwd=cwd, timeout=timeout, env=environment,
    )  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with a configuration and a task of the user's."""
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "my_task.py").write_text(TASK)
    (tmp_path / "mine.yaml").write_text("task: my_task:Task\nsteps: 3\nglobal_batch_size: 8\nmicro_batch_size: 2\n")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    (tmp_path / "broken.yaml").write_text("task: [\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "elsewhere").write_text("203.0.113.7 slots=1\n127.0.0.1\n")
    for name, mode in (("open.secret", 0o644), ("job.secret", 0o600)):
        (tmp_path / name).write_text("a secret of twenty-four c")
        (tmp_path / name).chmod(mode)
    (tmp_path / "old" / "checkpoints" / "step-00000003").mkdir(parents=True)
    return tmp_path


WRONG = {
    "unknown key": (["small.yaml", "step=3"], "unknown key step; did you mean steps?"),
    "unknown key in a section": (["small.yaml", "layout.zer=1"], "unknown key layout.zer; did you mean zero?"),
    "micro-batch that does not divide": (["small.yaml", "micro_batch_size=5"], "does not divide global_batch_size 28"),
    "a word for a number": (["small.yaml", "steps=many"], "steps = 'many': input should be a valid integer"),
    "missing configuration": (["nothing.yaml"], "cannot read configuration nothing.yaml"),
    "not a mapping": (["list.yaml"], "holds list; a configuration is a mapping"),
    "not YAML": (["broken.yaml"], "is not valid YAML"),
    "not an override": (["small.yaml", "steps"], "is not of the form key=value"),
    "missing path": (["small.yaml", "task=lm", "options={path: no/such/*.txt}"], "no file at no/such/*.txt"),
    "empty corpus": (["small.yaml", "task=lm", "options={path: empty}"], "no text in empty"),
    "more workers than micro-batches": (["small.yaml", "-n", "8"], "8 workers but only 7 micro-batches"),
    "unknown task": (["small.yaml", "task=lmm"], "task 'lmm' is not known; use lm, images"),
    "import path that fails": (["small.yaml", "task=no_such:Task"], "cannot import no_such"),
    "class that is not there": (["mine.yaml", "task=my_task:Other"], "module my_task has no class Other"),
    "options that do not fit": (["small.yaml", "options={wdth: 3}"], "its options are width, dropout"),
    "unknown optimizer": (
        ["small.yaml", "optimizer.name=Adamw"],
        "optimizer.name is 'Adamw'; did you mean AdamW? unisono.optim has GIANT, KFAC, LAMB, LARS, NewtonCG, and",
    ),
    "optimizer options that do not fit": (
        ["small.yaml", "optimizer={name: SGD, options: {beta: 1}}"],
        "do not fit SGD",
    ),
    "preload that fails": (["small.yaml", "preload=[no_such]"], "preload: cannot import no_such"),
    "empty dataset": (["mine.yaml", "options={fault: empty}"], "the training dataset is empty"),
    "loss that is NaN": (["mine.yaml", "options={fault: nan}"], "the loss is nan at step 1, micro-batch"),
    "directory of another run": (["small.yaml", "run_dir=old"], "old holds a run already; resume it with --resume"),
    "nothing to resume": (["small.yaml", "--resume"], "no run of task images in runs/ has a checkpoint to resume"),
    "part of an optimizer": (["mine.yaml", "optimizer.lr=0.1"], "key optimizer.name is missing"),
    "resume of nothing": (["small.yaml", "--resume", "run_dir=empty"], "no checkpoint in empty to resume from"),
    "unwritable run directory": (["small.yaml", "run_dir=/proc/nowhere"], "cannot write into run_dir /proc/nowhere"),
    "validation metric that is not there": (["small.yaml", "validation.metric=acc"], "the task has accuracy, loss"),
    "no secret": (["small.yaml", "--nnodes", "2"], "several hosts need a secret that all of them know"),
    "a secret that others can read": (
        ["small.yaml", "--nnodes", "2", "--secret-file", "open.secret"],
        "can be read by others (mode 0644); make it yours alone: chmod 600 open.secret",
    ),
    "a rendezvous without a port": (
        ["small.yaml", "--nnodes", "2", "--rendezvous", "here", "--secret-file", "job.secret"],
        "--rendezvous is 'here'; give HOST:PORT",
    ),
    "a host number that is too large": (
        ["small.yaml", "--nnodes", "2", "--node-rank", "2", "--secret-file", "job.secret"],
        "--node-rank is 2; with --nnodes 2 give 0 to 1",
    ),
    "options of several hosts for one": (["small.yaml", "--node-rank", "1"], "are for several hosts; give --nnodes"),
    "hosts from a file that is not there": (["small.yaml", "--hosts", "no"], "cannot read the hosts in no"),
    "a line that is no host": (["small.yaml", "--hosts", "small.yaml"], "small.yaml, line 2: 'task: images'"),
    "a first host that is not this machine": (
        ["small.yaml", "--hosts", "elsewhere"],
        "the first host, 203.0.113.7, is not this machine",
    ),
    "an address that is not this machine's": (
        ["small.yaml", "--nnodes", "2", "--rendezvous", "203.0.113.7:4000", "--secret-file", "job.secret"],
        "host 0 cannot listen on 203.0.113.7:4000",
    ),
    "an unknown algorithm": (["small.yaml", "wire.algorithm=rings"], "wire.algorithm = 'rings'"),
    "an algorithm and compression": (
        ["small.yaml", "wire={algorithm: ring, compression: int8}"],
        "compression int8 has its own way of summing",
    ),
    "packing what is compressed": (
        ["small.yaml", "wire={lossless: always, compression: int8}"],
        "lossless is for gradients that are not compressed",
    ),
    "momentum of nothing": (["small.yaml", "wire.momentum=0.9"], "momentum is for compression top_k, not none"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_sentence_and_exit_code_2(place: Path, case: str) -> None:
    arguments, expected = WRONG[case]
    before = {p for p in place.rglob("*") if "__pycache__" not in p.parts}
    started = time.monotonic()
    done = unisono("train", *arguments, cwd=place)
    assert time.monotonic() - started < 15
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("unisono: ") and expected in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    new = {p for p in place.rglob("*") if "__pycache__" not in p.parts} - before
    assert not [p for p in new if p.name.endswith(".tmp") or p.name.startswith("step-")], new


def test_a_users_exception_has_rank_and_traceback_and_exit_code_1(place: Path) -> None:
    done = unisono("train", "mine.yaml", "options={fault: item}", "-n", "2", cwd=place)
    assert done.returncode == 1
    assert "worker 1 of 2 failed" in done.stderr and "cannot decode this image" in done.stderr
    assert "raised by the training dataset for sample" in done.stderr and "my_task.py" in done.stderr


@pytest.mark.parametrize("size_kib", [16, 96])
def test_a_full_disk_is_one_sentence(place: Path, size_kib: int) -> None:
    """A file system of a few KiB in a mount namespace of its own: full at the records, or at a checkpoint."""
    full = place / "full"
    full.mkdir()
    train = f"{sys.executable} -m unisono train small.yaml run_dir=full/run options.width=32 steps=200"
    script = (
        f"mount -t tmpfs -o size={size_kib}k none full && {train} observe.tensorboard=false; echo code $?; find full"
    )
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, cwd=place)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"this machine forbids mounts: {done.stderr.strip()}")
    assert "code 2" in done.stdout, done.stderr
    assert "unisono: cannot write" in done.stderr and "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr and ".tmp" not in done.stdout


def test_help_is_quick_and_has_examples() -> None:
    started = time.monotonic()
    done = unisono("--help")
    assert done.returncode == 0 and "verify" in done.stdout
    assert time.monotonic() - started < 2  # 0.25 s on a quiet machine; the bound is for busy ones
    for command in (
        ["train"],
        ["run"],
        ["verify"],
        ["plan"],
        ["doctor"],
        ["report"],
        ["checkpoint", "export"],
        ["bench", "train"],
        ["bench", "comm"],
        ["bench", "pipeline"],
        ["bench", "network"],
    ):
        assert "Example: unisono" in unisono(*command, "--help").stdout, command
    check = "import sys, unisono.cli, unisono.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_train_resume_list_verify_export_report(place: Path) -> None:
    first = unisono("train", "small.yaml", "-n", "2", cwd=place)
    assert first.returncode == 0, first.stderr
    assert "report: runs/images-001/report.html" in first.stdout and "accuracy" in first.stdout
    assert (place / "runs/images-001/config.yaml").exists()
    resumed = unisono("train", "small.yaml", "steps=6", "--resume", "--json", "-n", "3", cwd=place)
    result = json.loads(resumed.stdout)
    assert result["step"] == 6 and result["workers"] == 3 and result["run_dir"] == "runs/images-001"
    straight = json.loads(unisono("train", "small.yaml", "steps=6", "--json", cwd=place).stdout)
    assert straight["digest"] == result["digest"] and straight["run_dir"] == "runs/images-002"
    listed = json.loads(unisono("checkpoint", "list", "runs/images-001", "--json", cwd=place).stdout)["checkpoints"]
    assert [(row["step"], row["intact"]) for row in listed] == [(6, True), (4, True)]
    assert "exporting" in unisono("checkpoint", "export", "runs/images-001", "out", cwd=place).stdout
    again = unisono("checkpoint", "export", "runs/images-001", "small.yaml", cwd=place)
    assert again.returncode == 2 and "small.yaml is there already" in again.stderr
    assert {p.name for p in (place / "out").iterdir()} == {"model.safetensors", "state_dict.pt"}
    assert unisono("report", "runs/images-001", cwd=place).returncode == 0
    manifest = place / "runs/images-001/checkpoints/step-00000006/manifest.json"
    manifest.write_text(manifest.read_text().replace("digest", "Digest", 1))
    damaged = unisono("checkpoint", "verify", "runs/images-001", cwd=place)
    assert damaged.returncode == 1 and "DAMAGED" in damaged.stdout


def test_under_another_launcher_it_says_what_to_do(place: Path) -> None:
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "0"}
    command = [sys.executable, "-m", "unisono", "train", "small.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, env=environment)
    assert done.returncode == 2 and "run a script that uses unisono.Trainer" in done.stderr


def test_results_for_programs_are_not_mixed_with_what_workers_print(place: Path) -> None:
    done = unisono("train", "mine.yaml", "--json", cwd=place)
    assert json.loads(done.stdout)["step"] == 3 and "a word of the user's" in done.stderr
    assert json.loads(unisono("verify", "mine.yaml", "--workers", "1,2", "--steps", "2", "--json", cwd=place).stdout)[
        "equal"
    ]
    assert "a word of the user's" in unisono("train", "mine.yaml", cwd=place).stdout


def test_the_version() -> None:
    assert unisono("--version").stdout.startswith("unisono 0.")


def test_two_runs_cannot_share_a_directory(place: Path) -> None:
    command = [sys.executable, "-m", "unisono", "train", "small.yaml", "steps=2000", "run_dir=shared"]
    first = subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert first.stdout is not None
    while "step 1/" not in first.stdout.readline():
        pass
    second = unisono("train", "small.yaml", "run_dir=shared", cwd=place)
    assert second.returncode == 2 and "another run is at work in shared" in second.stderr
    first.send_signal(signal.SIGINT)
    rest, errors = first.communicate(timeout=20)
    assert first.returncode == 130 and "to go on: unisono train" in rest and "--resume" in rest, errors


def test_verify_says_equal(place: Path) -> None:
    done = unisono(
        "verify", "small.yaml", "--workers", "1,2,3", "--steps", "4", "--resume-at", "2", "--json", cwd=place
    )
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["equal"] and set(report["digests"]) == {"1", "2", "3"}
    assert not (place / "runs").exists()


def test_verify_refuses_what_cannot_be(place: Path) -> None:
    for words, expected in (
        (["--workers", "1,x"], "give whole numbers"),
        (["--workers", "9"], "9 workers but only 7"),
        (["--resume-at", "8"], "--resume-at 8 is not before the last step, 8"),
    ):
        done = unisono("verify", "small.yaml", *words, cwd=place)
        assert done.returncode == 2 and expected in done.stderr


def test_plan_says_what_a_layout_is_made_of() -> None:
    words = ["configs/lm.yaml", "options.layers=6", "layout.pipeline=3", "layout.data=1", "layout.schedule=zb_h1"]
    found = json.loads(unisono("plan", *words, "--profile", "--json").stdout)
    assert len(found["stages"]) == len(found["workers"]) == 3 and found["fits"]
    assert sum(stage["parameters"] for stage in found["stages"]) == sum(r["parameters"] for r in found["profile"])
    assert sum(stage["flops"] for stage in found["stages"]) == sum(row["flops"] for row in found["profile"])
    assert found["total_bytes"] == sum(sum(worker["bytes"].values()) for worker in found["workers"])
    tight = unisono("plan", *words, "layout.recompute=auto", "layout.memory_gib=0.1").stdout
    assert "recompute full" in tight and "DOES NOT FIT" in tight
    text = unisono("plan", *words).stdout
    assert "stage 2: from blocks." in text and "fits in" in text
    refused = unisono("plan", "configs/lm.yaml", "layout.pipeline=40")
    assert (
        refused.returncode == 2
        and "the layout has 40 stages, but the model can be cut into 8 at most" in refused.stderr
    )


def test_doctor_is_content() -> None:
    done = unisono("doctor", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["healthy"]
    assert {"torch", "exactness", "shared memory"} <= {f["name"] for f in report["findings"]}


def test_the_tasks_of_the_configurations_are_exact(pool: object) -> None:
    for name in ("lm", "images"):
        done = unisono("verify", f"configs/{name}.yaml", "--workers", "1,2", "--steps", "2", "--json")
        assert done.returncode == 0 and json.loads(done.stdout)["equal"], done.stderr


def test_a_run_that_is_asked_to_end_is_resumed_with_the_same_bits(tmp_path: Path) -> None:
    """SIGTERM, as schedulers send it: exit code 0, and nothing is computed twice."""
    words = [sys.executable, "-m", "unisono", "train", str(ROOT / "configs" / "images.yaml"), "-n", "2", "steps=60"]
    whole = subprocess.run(
        [*words, f"run_dir={tmp_path / 'whole'}", "--json"], capture_output=True, text=True, timeout=60
    )
    words += [f"run_dir={tmp_path / 'run'}"]
    process = subprocess.Popen(
        [*words, "validation.every=1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    events = tmp_path / "run" / "events.jsonl"
    until = time.monotonic() + 30
    while not (events.exists() and '"step": 3' in events.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=20)
    assert process.returncode == 0 and "stopping after this step" in errors and "to go on: unisono train" in out
    again = subprocess.run([*words, "--resume", "--json"], capture_output=True, text=True, timeout=60)
    assert json.loads(again.stdout)["digest"] == json.loads(whole.stdout)["digest"]
    records = [json.loads(line) for line in events.read_text().splitlines()]
    assert [r["step"] for r in records if r["event"] == "StepFinished"] == list(range(1, 61))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["scale", "nowhere", "3"], "no run of this host is at work in nowhere; give the directory of one that is"),
        (["train", "configs/lm.yaml", "-n", "4:2"], "--workers is '4:2'; give a number from 1, or a range such as 2:8"),
        (["train", "configs/lm.yaml", "-n", "2:9"], "9 workers but only 4 micro-batches in a step"),
        (["train", "configs/lm.yaml", "-n", "1:2", "layout.data=2"], "layout.data is 2, and --workers is 1:2"),
        (["train", "configs/lm.yaml", "-n", "2", "layout.pipeline=2", "--spares", "1"], "leave --spares out"),
        (["train", "configs/lm.yaml", "-n", "2:4", "layout.tensor=2"], "use device cpu and layout.tensor=1"),
        (["train", "configs/lm.yaml", "fault.on_los=stop"], "unknown key fault.on_los; did you mean on_loss?"),
        (["train", "configs/lm.yaml", "fault.on_loss=never"], "fault.on_loss = 'never'"),
        (["chaos", "configs/lm.yaml", "--faults", "kil"], "--faults names 'kil'; known are kill-data"),
        (["chaos", "configs/lm.yaml", "-n", "2", "sync.mode=hogwild"], "no two runs are alike; use another sync.mode"),
        (["chaos", "configs/lm.yaml", "-n", "1", "fault.on_loss=stop"], "chaos needs a run that survives the loss of"),
        (["chaos", "configs/lm.yaml", "-n", "2", "--faults", "kill-two", "--repeat", "1"], "at least 3 workers"),
        (["chaos", "configs/lm.yaml", "-n", "4", "--faults", "stop,slow-core"], "slow-core is for two workers (-n 2)"),
        (["chaos", "configs/lm.yaml", "--hosts", "--faults", "comet"], "--faults names 'comet'; known are host-worker"),
    ],
)
def test_wrong_words_about_faults_are_refused(words: list[str], expected: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "unisono", *words], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.returncode == 2 and expected in done.stderr, done.stderr
