"""Being asked to stop: by a scheduler, by Ctrl-C, by a closed terminal, or by the death of the launcher."""

from __future__ import annotations

import os
import signal
import socket
import stat
import threading
from contextlib import suppress

from paco_ds.command import INTERRUPTED
from paco_ds.distributed.launchers import is_gone, launchers
from paco_ds.errors import RESUMABLE

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class StopRequest:
    """True once this rank was asked to stop; the step under way is finished first.

    The request is SIGTERM (preemption, a time limit), SIGUSR1 (Slurm's warning), Ctrl-C, SIGHUP (a closed terminal;
    not under nohup) or the death of a launcher on this host. Before `begin` there is nothing to save: the process ends
    at once with status `RESUMABLE`. A second Ctrl-C ends it at once too.

    A thread hears the signals: the main thread may wait for other ranks, for minutes, and Python runs a handler only
    after that.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._begun = False
        self._interrupts = 0
        self._launchers = launchers()
        heard = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._receive) for number in heard}
        self._woken, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.settimeout(1.0)
        self._wakeup_before = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stop-request", daemon=True)
        self._thread.start()

    def __call__(self) -> bool:
        """True from the first request on."""
        return self.reason is not None

    def begin(self) -> None:
        """From now on a request waits for the end of the step."""
        self._begun = True

    def close(self) -> None:
        """Handle signals as before."""
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._closing.set()
        self._wake.send(b"\0")
        self._thread.join()
        self._wake.close()
        self._woken.close()

    def _receive(self, number: int, frame: object) -> None:
        if number == signal.SIGHUP:  # before the main thread prints again
            _leave_terminal()
        self._ask(signal.Signals(number).name)

    def _ask(self, reason: str) -> None:
        self.reason = self.reason or reason

    def _watch(self) -> None:
        while not self._closing.is_set():
            try:
                for number in self._woken.recv(64):
                    self._hear(number)
            except TimeoutError:
                if self.reason is None and any(map(is_gone, self._launchers)):
                    self._ask("its launcher died")
            if self.reason is not None and not self._begun:
                self._end(f"stopped before its first step ({self.reason})", RESUMABLE)

    def _hear(self, number: int) -> None:
        if number not in self._before:
            return
        self._ask(signal.Signals(number).name)
        self._interrupts += number == signal.SIGINT
        if self._interrupts == 2:
            self._end(
                "interrupted twice: ended at once; the same command resumes from the last checkpoint", INTERRUPTED
            )

    def _end(self, message: str, status: int) -> None:
        if os.environ.get("RANK", "0") == "0":
            with suppress(OSError):  # not print: the main thread may be inside it
                os.write(2, f"{message}\n".encode())
        # not sys.exit: the main thread may wait for other ranks, or be in the middle of an import
        os._exit(status)


def _leave_terminal() -> None:
    """Print into the void from now on, if standard output was a terminal that is gone: to write to it is an error."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                with open(os.devnull, "wb") as void:
                    os.dup2(void.fileno(), descriptor)
