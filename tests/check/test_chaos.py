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
