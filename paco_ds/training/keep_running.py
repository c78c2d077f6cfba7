"""Start a training again until it is finished, without a person.

examples:
  paco-keep-running --restarts 5 -- deepspeed --hostfile hosts paco_ds/train.py --config RECIPE.yaml --output runs/a
  paco-keep-running --elastic -- deepspeed --hostfile hosts paco_ds/train.py --config RECIPE.yaml --output runs/a

Starts the command again after a lost rank, a hang, a kill or a stop; waits longer each time, and gives up after
--restarts starts in a row that wrote no checkpoint. A user's error, values that are not finite and a full disk end it
at once, as they would come again. SIGTERM, SIGUSR1, SIGHUP and Ctrl-C are passed on to the command; then it is not
started again. On one host, `paco-train --restarts 5 --ranks 2 ...` needs no launcher.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from paco_ds.command import INTERRUPTED, at_least, report_user_errors
from paco_ds.config.load import load_recipe
from paco_ds.distributed.hostfile import answers, hosts_left, on_hosts
from paco_ds.distributed.launchers import KEEPER, is_launcher
from paco_ds.errors import RESUMABLE, NotFiniteError, StorageError, UserError
from paco_ds.files import replace_text
from paco_ds.training.outcome import Outcome, read_outcome, run_directory
from paco_ds.training.stop_request import SIGNALS

FINAL = (0, UserError.status, NotFiniteError.status, StorageError.status, 126, 127, INTERRUPTED)
"""Statuses after which a start would end in the same way; 126 and 127 are a shell's for a command it cannot run."""
LONGEST_WAIT = 300.0  # seconds between two starts without progress; the first is 1
LEAVE = 30.0  # seconds that ranks have to end by themselves after another failed, as DeepSpeed's launcher gives them
LINGER = 600.0  # seconds that ranks have to write their checkpoint after their launcher ended

Processes = Sequence[tuple[Sequence[str], Mapping[str, str]]]  # (command, additions to the environment) of each


class Keeper:
    """Starts the processes of a job again until the run is finished.

    Args:
        run: its run directory.
        restarts: starts in a row without a new checkpoint after which it gives up.
        processes: called before each start.
    """

    def __init__(self, run: Path, restarts: int, processes: Callable[[], Processes]) -> None:
        self.run_dir, self.restarts, self.processes = run, restarts, processes
        self.asked: int | None = None  # the signal that asked to stop
        self._job: list[subprocess.Popen[bytes]] = []

    def run(self) -> int:
        """Returns the exit status of the last start."""
        failures, starts = 0, 0
        _adopt_orphans()
        with self._signals_passed_on():
            while True:
                before, step = read_outcome(self.run_dir), newest_step(self.run_dir)
                outcome = self._ended(before, self._start())
                starts += 1
                if outcome.status in FINAL or self.asked is not None:
                    return outcome.status
                progressed = newest_step(self.run_dir) > step
                failures = 0 if progressed else failures + 1
                if failures > self.restarts > 0:
                    _say(f"gave up: {failures} starts in a row wrote no checkpoint; the last: {outcome.reason}")
                if failures > self.restarts or not self.restarts:
                    return outcome.status
                wait = 0.0 if progressed else min(LONGEST_WAIT, 2.0 ** (failures - 1))
                _say(f"{outcome.reason} (status {outcome.status}): restart {starts} in {wait:g} s")
                self._sleep(wait)
                if self.asked is not None:
                    return outcome.status

    def _ended(self, before: Outcome | None, status: int) -> Outcome:
        """How this start ended: what rank 0 wrote or, if it could not, what the launcher's status tells."""
        written = read_outcome(self.run_dir)
        if written is not None and written != before:
            return written
        if status in FINAL and status != 0:
            return Outcome(status, "ended")
        if status == 0:  # of a launcher that lost sight of its ranks
            outcome = Outcome(RESUMABLE, "the launcher ended before the run")
        elif status < 0 or status == 247:
            outcome = Outcome(RESUMABLE, f"killed by signal {-status if status < 0 else 256 - status}")
        else:
            outcome = Outcome(status, f"ended with status {status} and without a word")
        with suppress(OSError):
            if self.run_dir.is_dir():  # the next start logs it
                outcome.write(self.run_dir)
        return outcome

    def _start(self) -> int:
        """Start the processes and wait for all, and for what they leave behind; the first status that is not 0."""
        for command, additions in self.processes():
            environment = {**os.environ, **additions, KEEPER: str(os.getpid())}
            # a session of its own: Ctrl-C reaches it once, through this process
            self._job.append(subprocess.Popen(command, env=environment, start_new_session=True))
        if self.asked is not None:  # a moment ago
            self._pass_on(signal.SIGTERM)
        running, status, deadline = {process.pid for process in self._job}, 0, float("inf")
        while running:
            for pid, code in _ended_children():
                if pid in running:
                    running.discard(pid)
                    if code and not status:
                        status, deadline = code, time.monotonic() + LEAVE
                        self._pass_on(signal.SIGTERM, running)
            if time.monotonic() > deadline:
                self._pass_on(signal.SIGKILL, running)
            time.sleep(0.05)
        self._job = []
        self._end_orphans()
        return status

    def _end_orphans(self) -> None:
        """Wait for ranks whose launcher was killed: they write a checkpoint, and hold the run directory's lock.

        Launchers are not told, since they would kill their ranks after 30 seconds.
        """
        _signal_descendants(signal.SIGTERM, lambda process: not is_launcher(process))
        deadline = time.monotonic() + LINGER
        while psutil.Process().children():
            for _ in _ended_children():
                pass
            if time.monotonic() > deadline:
                _signal_descendants(signal.SIGKILL)
            time.sleep(0.05)

    def _pass_on(self, number: int, to: set[int] | None = None) -> None:
        for pid in [process.pid for process in self._job] if to is None else to:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    @contextmanager
    def _signals_passed_on(self) -> Iterator[None]:
        heard = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._receive) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        """Ask the job to stop as a scheduler would; asked a second time by Ctrl-C, end it at once."""
        again = self.asked is not None and number == signal.SIGINT
        self.asked = self.asked or number
        if again:
            _signal_descendants(signal.SIGKILL)
        else:
            self._pass_on(signal.SIGTERM)

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self.asked is None and time.monotonic() < until:
            time.sleep(0.05)


def newest_step(run: Path) -> int:
    """Step of the newest checkpoint, by its name; 0 without one."""
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in (run / "checkpoints").glob("step-*"))
    return max((int(name[1]) for name in names if name), default=0)


def local_ranks(command: Sequence[str], count: int) -> Processes:
    """The processes of a job of `count` ranks on this host, as a launcher would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    of_job = {"WORLD_SIZE": str(count), "LOCAL_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [(command, of_job | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)]


def _adopt_orphans() -> None:
    """Become the parent of ranks whose launcher is killed, so that the next start does not meet them."""
    subreaper = 36  # PR_SET_CHILD_SUBREAPER of linux/prctl.h
    if ctypes.CDLL(None, use_errno=True).prctl(subreaper, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def _ended_children() -> Iterator[tuple[int, int]]:
    """(process, exit code) of own and adopted children that ended since; a signal is negative."""
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            yield pid, os.waitstatus_to_exitcode(status)


def _signal_descendants(number: int, which: Callable[[psutil.Process], bool] = lambda process: True) -> None:
    for process in filter(which, psutil.Process().children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _say(what: str) -> None:
    print(f"keep-running: {what}", file=sys.stderr, flush=True)


def _elastic(command: Sequence[str], run: Path) -> Callable[[], Processes]:
    words = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    words.add_argument("--hostfile", "-H", type=Path)
    hostfile: Path | None = words.parse_known_args(command)[0].hostfile
    if hostfile is None:
        raise UserError("--elastic chooses among the hosts of a --hostfile, which the command has not")

    def processes() -> Processes:
        recipe = run / "recipe.yaml"
        micro_batches = load_recipe(recipe).step.micro_batches if recipe.exists() else None
        left = hosts_left(hostfile, micro_batches, answers)
        run.mkdir(parents=True, exist_ok=True)
        reduced = replace_text(run / "hosts", "".join(f"{host} slots={slots}\n" for host, slots in left.items()))
        return [(on_hosts(command, reduced, sum(left.values())), {})]

    return processes


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--restarts", type=at_least(0), default=5, help="starts in a row without a new checkpoint, 5")
    parser.add_argument("--run", type=Path, help="run directory; by default that of the command's --output or --config")
    parser.add_argument("--elastic", action="store_true", help="leave out hosts of the --hostfile that do not answer")
    parser.add_argument("command", nargs="+", help="after --: the command that starts the job")
    arguments = parser.parse_args(argv)
    command = arguments.command
    with report_user_errors():
        words = argparse.ArgumentParser(add_help=False)
        words.add_argument("--output", type=Path)
        words.add_argument("--config")
        given, _ = words.parse_known_args(command)
        run = arguments.run or run_directory(given.output, given.config)
        processes = _elastic(command, run) if arguments.elastic else lambda: [(command, {})]
        return Keeper(run, arguments.restarts, processes).run()


if __name__ == "__main__":
    sys.exit(main())
