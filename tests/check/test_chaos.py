"""``unisono chaos`` on a small run: every row is good, and says what it should."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
KEYS = {
    *("fault", "repetitions", "recovery_p50_s", "recovery_p95_s", "lost_steps", "recomputed_micro_batches"),
    *("exactly_once", "digest_equal", "survivors_restarted"),
}


def test_faults_do_not_matter() -> None:
    faults = ["kill-mid-update", "stop", "disk-full"]
    command = [sys.executable, "-m", "unisono", "chaos", str(ROOT / "configs" / "images.yaml"), "-n", "3"]
    options = ["--repeat", "2", "--json", "--faults", ",".join(faults)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = {row["fault"]: row for row in json.loads(done.stdout)["rows"]}
    assert list(rows) == faults and all(set(row) >= KEYS for row in rows.values())
    for row in rows.values():
        assert row["exactly_once"] and row["digest_equal"], row
        assert row["lost_steps"] == row["survivors_restarted"] == 0, row
    assert rows["kill-mid-update"]["repetitions"] == 2 and rows["stop"]["recovery_p50_s"] > 1.0
    assert "failures told" in rows["disk-full"]["note"]


def test_a_worker_alone_starts_again_from_its_snapshots() -> None:
    command = [sys.executable, "-m", "unisono", "chaos", str(ROOT / "configs" / "images.yaml"), "-n", "1"]
    options = ["fault.snapshot_every=3", "--repeat", "3", "--json", "--faults"]
    done = subprocess.run(
        [*command, *options, "kill-mid-update,stop,random"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    for row in json.loads(done.stdout)["rows"]:
        assert row["exactly_once"] and row["digest_equal"] and row["lost_steps"] <= 3, row
    refused = subprocess.run([*command, "--faults", "scale"], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2 and "all start again from a snapshot when one is lost" in refused.stderr
