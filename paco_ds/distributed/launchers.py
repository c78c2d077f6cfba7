"""The launchers of this process: which of its ancestors started it as a rank, and whether they are still there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import psutil

KEEPER = "PACO_KEEP_RUNNING"
"""Environment variable: process that starts this job again when it ends early, set by `paco-keep-running`."""

_PROGRAMS = {"deepspeed", "deepspeed.pt", "torchrun"}
_MODULES = {
    "deepspeed.launcher.runner",
    "deepspeed.launcher.launch",
    "torch.distributed.run",
    "torch.distributed.launch",
}


def launchers() -> list[int]:
    """Process numbers of the ancestors of this process that have to live as long as it does, on this host.

    DeepSpeed's launcher and the `deepspeed` above it, or torchrun, where RANK says that one started this process; and
    `paco-keep-running`. A shell is none: a run that was started by hand goes on when its terminal is closed.
    """
    found = []
    if "RANK" in os.environ:
        found = [parent.pid for parent in psutil.Process().parents() if is_launcher(parent)]
    if keeper := os.environ.get(KEEPER):
        found.append(int(keeper))
    return found


def is_gone(pid: int) -> bool:
    """Whether a process ended, also if nobody has taken its status yet."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def is_launcher(process: psutil.Process) -> bool:
    """Whether a process is DeepSpeed's launcher, the `deepspeed` above it, or torchrun."""
    try:
        words: Sequence[str] = process.cmdline()[:5]  # python -u -m MODULE, or python PROGRAM
    except psutil.Error:
        return False
    return not _MODULES.isdisjoint(words) or not _PROGRAMS.isdisjoint(Path(word).name for word in words[:3])
