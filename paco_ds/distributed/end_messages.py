"""What a rank says when its job ends before its time: ranks, reasons, remedies and stacks in words."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

import psutil

from paco_ds.distributed.link import Message


def name_ranks(ranks: Iterable[int]) -> str:
    """Ranks in words: "rank 3", "ranks 0, 8-15"."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    listed = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    one = len(spans) == 1 and spans[0][0] == spans[0][1]
    return f"{'rank' if one else 'ranks'} {listed}"


def reason(error: BaseException | None) -> str:
    """Why a rank failed, as it tells the others."""
    text = str(error)[:4000]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def how_lost(error: Exception) -> str:
    """What the error of a rank's connection says about the rank."""
    if isinstance(error, ConnectionResetError | BrokenPipeError):
        return "its process died (killed? out of memory? the kernel log of its host tells)"
    if isinstance(error, OSError):
        return f"its host does not answer ({error})"
    return f"it sent what no rank sends ({error!r})"


def status_in(message: Message) -> int:
    """The exit status that another rank gives; 1 where it is none of a failure.

    Raises:
        ValueError, LookupError: it gives no number.
    """
    status = int(message["status"])
    return status if 0 < status < 256 else 1


def in_time(remedy: Callable[[], str], seconds: float) -> str:
    """The sentence that says what to do next, or a general one after some seconds: it reads files, and their disk may
    be what hangs."""
    found = ["Run the same command again"]

    def ask() -> None:
        try:
            found.append(remedy())
        except Exception as error:  # the message must be printed in any case
            found.append(f"{found[0]} ({error})")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[-1]


def stacks() -> str:
    """Python stacks of all threads of this process. Reads no source files: their disk may be what hangs."""
    with open(os.memfd_create("stacks"), "rb") as file:
        faulthandler.dump_traceback(file.fileno())
        file.seek(0)
        return file.read().decode(errors="replace")


def resume_children() -> None:
    """Continue processes of this one that are stopped: loader processes end with their rank, but only if they run."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # gone
            child.resume()


@contextmanager
def sigterm_ignored() -> Iterator[None]:
    """SIGTERM does nothing within, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
