"""The check of every node before a job, by the launcher."""

import json
import socket
import subprocess
import sys
from pathlib import Path

from tests.damaged import copy_with_damage
from tests.recipes import write_tiny_recipe

PREFLIGHT = Path(__file__).parents[2] / "tools" / "preflight.py"


def test_every_node_is_started_and_a_damaged_shard_is_named(striped_shards, tmp_path):
    """Two ranks of this host: joined, their all_reduce adds up; a shard that differs from the manifest is one line."""
    shards = copy_with_damage(striped_shards, tmp_path / "shards", "val-00000.tar")
    (tmp_path / "zero1.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    write_tiny_recipe(tmp_path / "tiny.yaml", f"data.shards={shards}", "engine.deepspeed=zero1.json")
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = (sys.executable, PREFLIGHT, "--launch", "hosts", "--recipe", "tiny.yaml", "--master-port", port)
    done = subprocess.run([str(word) for word in words], cwd=tmp_path, capture_output=True, text=True)
    assert "2 ranks; all_reduce of 64 MiB in" in done.stdout, done.stdout + done.stderr
    assert f"{socket.gethostname()}: shard val-00000.tar is not what the manifest says: copy it again" in done.stdout
    assert done.returncode == 1
