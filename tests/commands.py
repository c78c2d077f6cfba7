"""A command in a process of its own that need not import: half of a short one is imports."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.pool import start_fork_server


def run_command(
    module: str, *arguments: object, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE ARGUMENTS`, forked from the fork server of the ranks.

    Raises:
        AssertionError: it failed, with what it said; not if `check` is False.
    """
    start_fork_server()
    words = [str(word) for word in arguments]
    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        context = multiprocessing.get_context("forkserver")
        process = context.Process(target=_run, args=(module, words, environment, files), daemon=False)
        process.start()
        process.join(600)
        if hung := process.is_alive():
            process.kill()
            process.join()
        said = [Path(file).read_text() for file in files]
    assert not hung, f"{module} did not end:\n{said[0]}{said[1]}"
    done = subprocess.CompletedProcess([module, *words], process.exitcode or 0, *said)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def _run(module: str, words: list[str], environment: dict[str, str], files: list[str]) -> None:
    for stream, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    os.environ |= {"CUDA_VISIBLE_DEVICES": ""} | environment
    sys.argv = [module, *words]
    sys.exit(importlib.import_module(module).main(words))
