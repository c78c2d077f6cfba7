"""What the command line tools share: errors a user can mend are one message, not a traceback; texts are no markup."""

from __future__ import annotations

import argparse
import codecs
import errno
import io
import logging
import os
import select
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from paco_ds.errors import RESUMABLE, StorageError, UserError, printable

# Threads of torch wait for each other by sleeping. By spinning, as is the default, two of them that share two cores
# with other processes train at a twentieth of their rate. Read when torch is loaded, which is later than this.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""
OUT_OF_MEMORY = 1
"""Exit status where memory was short: that of an error of the program."""
READER_LEFT = 141
"""Exit status when the reader of standard output has left, as shells have it of SIGPIPE."""
_NO_NEWS = ("Setting accelerator to CPU", "**** You are using ZeRO with an untested optimizer")
_DEPRECATED = (
    r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor|_all_gather_base|_reduce_scatter_base)` is "
)
_REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there, or have the quota raised",
    errno.EROFS: "have it mounted for writing",
    errno.EIO: "the kernel log of this host tells more",
}


class Screen(Console):
    """A console that prints texts as they are written, also names from outside, and survives a broken pipe.

    Square brackets are no markup and `:cat:` is no emoji; control characters and credentials are replaced, see
    `errors.printable`. A pipe breaks when the ssh connection to this host ends before the run does: whenever a job over
    several hosts is stopped, just before its checkpoint is written.
    """

    def __init__(self, file: TextIO | None = None, *, width: int | None = None, quiet: bool = False) -> None:
        super().__init__(file=file, width=width, quiet=quiet, markup=False, emoji=False)
        if self.width < 1:  # COLUMNS=0, as some terminals without a size have it: nothing would be printed
            self.width = 80

    def render_str(self, text: str, **style: Any) -> Text:
        """The text of a line or of a table's title or cell, as rich asks for it."""
        return super().render_str(printable(text), **style)

    def on_broken_pipe(self) -> None:
        """Stop printing; rich would end the process."""
        with suppress(SystemExit):
            super().on_broken_pipe()


def say(text: str) -> None:
    """Print a line to standard output at once, safe for a terminal whatever the names in it are."""
    print(printable(text), flush=True)


def silence_known_noise() -> None:
    """Drop what DeepSpeed and torch say at each start that no user can act on; other lines and warnings come through.

    That no GPU was found, which a start says itself; that DeepSpeed does not know our optimizer, which is tested with
    each of its stages here; that a function of torch which DeepSpeed calls is deprecated.
    """
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    warnings.filterwarnings("ignore", _DEPRECATED, FutureWarning, r"torch\.distributed\.c10d_logger$")


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NO_NEWS)


def at_least(least: int) -> Callable[[str], int]:
    """A type of an argument: a whole number of at least so much."""

    def number(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of {least} or more, without a unit")
        return int(text)

    return number


@contextmanager
def standard_output() -> Iterator[None]:
    """Standard output in the block: what its encoding lacks is replaced, and the block ends quietly when its reader has
    left, as `| head` does. A rank of a job goes on without its reader, see `Screen`."""
    rank = "RANK" in os.environ
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        codecs.register_error("paco_ds.shown", _shown)  # another handler is the user's, by PYTHONIOENCODING
        sys.stdout.reconfigure(errors="paco_ds.shown")
    try:
        yield
        if not rank and sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        if rank or not _reader_left():
            raise  # of a connection
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        raise SystemExit(READER_LEFT) from None


def _shown(error: UnicodeError) -> tuple[str | bytes, int]:
    """A file's name whose bytes are not UTF-8 as it is, else a question mark."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("replace")(error)


def _reader_left() -> bool:
    with suppress(io.UnsupportedOperation, AttributeError):  # a stand-in without a file, or none
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)  # no event: errors and a closed pipe are reported without one
        return bool(poll.poll(0))
    return False


@contextmanager
def report_user_errors() -> Iterator[None]:
    """Print a `UserError`, or an error of the operating system, on one line and exit with its status, upon which a
    launcher ends the job; others name their rank. Ctrl-C is a line too. Standard output is as in `standard_output`."""
    try:
        require_utf8_names()
        with standard_output():
            yield
    except KeyboardInterrupt:
        raise SystemExit(report_interrupt()) from None
    except Exception as error:
        if (status := exit_status(error)) is None:
            if "RANK" in os.environ:
                error.add_note(f"on rank {os.environ['RANK']}")
            raise
        report_error(error)
        raise SystemExit(status) from None


def require_utf8_names() -> None:
    """Raise UserError if names of files are not read as UTF-8: names of classes would be others than on other hosts,
    and images with such names missing. In the C locale Python takes UTF-8 by itself."""
    if (encoding := sys.getfilesystemencoding()) != "utf-8":
        raise UserError(f"the locale of this shell reads names of files as {encoding}, not UTF-8: set PYTHONUTF8=1")


def report_error(error: Exception) -> None:
    """Print an error on one line, with the rank."""
    rank = os.environ.get("RANK", "0")
    where = f" (rank {rank} of {os.environ['WORLD_SIZE']})" if "WORLD_SIZE" in os.environ else ""
    text = _in_words(error) if isinstance(error, OSError) else str(error)
    if _lacked_memory(error):
        text = _short_of_memory(error)
    print(f"error{where}: {printable(text)}", file=sys.stderr, flush=True)


def report_interrupt() -> int:
    """Print that Ctrl-C was pressed; returns the exit status."""
    print("interrupted; give the same command again to resume", file=sys.stderr, flush=True)
    return INTERRUPTED


@contextmanager
def one_line_on_interrupt() -> Iterator[None]:
    """In the block Ctrl-C ends the process at once with one line: in the middle of an import, an exception may be shown
    or swallowed by a library. For what leaves nothing half done."""
    signal.signal(signal.SIGINT, _end_interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a script had no handler before, see its first lines


def _end_interrupted(number: int, frame: object) -> None:
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def exit_status(error: BaseException | None) -> int | None:
    """Status of a command that ends with this error; None for one of the program, which is shown with its traceback.

    An error of the operating system is one of storage, which needs a person, of a connection, which may come back, or
    of a path that the user gave. A library's OSError without an errno is one of the program. Where memory was short a
    start again may help, as after an error of the program.
    """
    if isinstance(error, UserError):
        return error.status
    if _lacked_memory(error):
        return OUT_OF_MEMORY
    if not isinstance(error, OSError) or error.strerror is None:
        return None
    if error.errno in _REMEDIES:
        return StorageError.status
    return RESUMABLE if isinstance(error, ConnectionError | TimeoutError) else UserError.status


def _lacked_memory(error: BaseException | None) -> bool:
    """Whether it is torch's error, or Python's, that no memory was left on the GPU or the host."""
    named = {kind.__name__ for kind in type(error).__mro__}  # torch itself is not imported here
    return bool({"OutOfMemoryError", "MemoryError"} & named) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _short_of_memory(error: Exception) -> str:
    said = (str(error).splitlines() or [""])[0]
    return (
        f"out of memory{f' ({said:.300})' if said else ''}: paco-preflight --plan says what a training needs; lower "
        f"step.micro_batch or queue.length, or set engine.activation_checkpointing"
    )


def _in_words(error: OSError) -> str:
    if error.strerror is None:
        return str(error)
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    remedy = _REMEDIES.get(error.errno or 0)
    then = f"; {remedy}, then give the same command again" if remedy else ""
    return f"{' -> '.join(names)}{': ' if names else ''}{error.strerror}{then}"
