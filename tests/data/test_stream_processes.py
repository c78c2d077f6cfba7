"""Loader processes that are killed: the rank says so and ends."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paco_ds.data.stream import loader_processes
from paco_ds.data.stream.loader_processes import _raising, name_semaphores
from paco_ds.errors import LostProcessError

SCRIPT = """
import os, signal, sys
import psutil
from paco_ds.data.manifest import load_manifest
from paco_ds.distributed.ranks import MicroBatchLayout
from paco_ds.training.build import build_stream
from tests.recipes import tiny_recipe

if __name__ == "__main__":
    recipe = tiny_recipe("schedule.epochs=500", "data.workers=2")
    stream = build_stream(recipe, load_manifest(sys.argv[1]), MicroBatchLayout(8, 4, 0, 1))
    next(stream)
    if sys.argv[2] == "killed":
        workers = [p for p in psutil.Process().children(recursive=True) if "forkserver" in " ".join(p.cmdline())]
        os.kill(workers[-1].pid, signal.SIGKILL)
        for _ in range(1000):
            next(stream)
    raise ValueError("something else went wrong, and nobody closed the stream")
"""


@pytest.mark.parametrize(
    ("what", "message"),
    [("killed", r"LostProcessError: loader process \d+ \(-9\).* died.*lower data.workers"), ("left", "something else")],
)
def test_the_rank_ends_whatever_became_of_its_loader_processes(striped_shards, tmp_path, what, message):
    """They do not see SIGTERM; waiting for them at exit would last for ever."""
    (tmp_path / "script.py").write_text(SCRIPT)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(tmp_path / "script.py"), str(striped_shards), what],
        cwd=root,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr


def _end_soon():
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_connection_that_breaks_before_its_process_has_ended_is_laid_to_the_process(monkeypatch):
    """The rank hears of the one before the other."""
    monkeypatch.setattr(loader_processes, "_NEWS", 300)
    process = multiprocessing.get_context("forkserver").Process(target=_end_soon)
    process.start()

    def parts():
        raise ConnectionResetError("reset by peer")
        yield

    with pytest.raises(LostProcessError, match=rf"loader process {process.pid} \(-9\).* died"):
        next(_raising(parts(), [process], lambda: None))


def test_an_error_without_loader_processes_is_raised_at_once(monkeypatch):
    monkeypatch.setattr(loader_processes.connection, "wait", lambda *a, **k: pytest.fail("waited for nobody"))

    def parts():
        raise NotADirectoryError("cache")
        yield

    with pytest.raises(NotADirectoryError, match="cache"):
        next(_raising(parts(), [], lambda: None))


def test_semaphores_of_dead_processes_are_removed_and_others_stay(tmp_path, monkeypatch):
    """Those that are left when a scheduler kills a rank and its resource tracker together."""
    mark = f"paco-{os.stat('/proc/self/ns/pid').st_ino}"
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in (f"{mark}-{dead.pid}-a", f"{mark}-{os.getpid()}-b", f"paco-1-{dead.pid}-c", "mp-d"):
        (tmp_path / f"sem.{name}").touch()
    config = vars(multiprocessing.current_process())["_config"]
    monkeypatch.setitem(config, "semprefix", "/mp")
    name_semaphores(tmp_path)
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["b", "c", "d"]
    assert config["semprefix"] == f"/{mark}-{os.getpid()}"
