"""Errors of commands: one line and an exit status."""

import errno
import os
import signal
import subprocess
import sys

import pytest
import torch

from paco_ds.command import INTERRUPTED, READER_LEFT, Screen, report_user_errors
from paco_ds.data.pack.command import main as build
from paco_ds.errors import CheckpointError, NotFiniteError, StorageError


@pytest.mark.parametrize(("given", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_of_torch_wait_asleep_unless_told_otherwise(given, policy):
    """Before torch reads it."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
    program = "import os, sys, paco_ds.train; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [policy, "False"]


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (CheckpointError("damaged"), 2, "error: damaged"),
        (NotFiniteError("loss is nan"), 70, "error: loss is nan"),
        (StorageError("no inode"), 74, "error: no inode"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/mnt/x"),
            74,
            "error: /mnt/x: No space left on device; make room there, then give the same command again",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/y"), 2, "error: /y: No such file or directory"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 75, "error: Broken pipe"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), 75, "error: Connection reset by peer"),
    ],
)
def test_an_error_is_one_line_and_a_status(error, status, line, capsys, monkeypatch):
    """Also one of the operating system."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as end, report_user_errors():
        raise error
    assert end.value.code == status
    assert capsys.readouterr().err == f"{line}\n"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 79 GiB\nmore"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 400 bytes"),
        MemoryError(),
    ],
)
def test_a_lack_of_memory_is_one_line_with_what_to_do(error, capsys):
    """On a GPU and on the host; status 1, since a start again may find more."""
    with pytest.raises(SystemExit) as end, report_user_errors():
        raise error
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory")
    assert line.endswith("lower step.micro_batch or queue.length, or set engine.activation_checkpointing")


def test_a_terminal_without_a_width_is_printed_to(monkeypatch, capsys):
    """COLUMNS=0: rich would print nothing at all."""
    monkeypatch.setenv("COLUMNS", "0")
    Screen().print("a line")
    assert capsys.readouterr().out == "a line\n"


def test_a_librarys_own_error_keeps_its_traceback():
    with pytest.raises(OSError, match="truncated"), report_user_errors():
        raise OSError("image file is truncated")


COMMAND = "from paco_ds.command import report_user_errors\nwith report_user_errors(): "


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("utf-8", "café █ ".encode() + b"\xff"),
        ("latin-1", b"caf\xe9 ? \xff"),
        ("ascii:backslashreplace", rb"caf\xe9 \u2588 \udcff"),
    ],
)
def test_what_a_terminal_cannot_show_is_replaced(encoding, shown):
    """Bytes of names stay as they are; a handler that the user chose holds."""
    command = [sys.executable, "-c", COMMAND + r"print('caf\xe9 \u2588 \udcff', end='')"]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    assert subprocess.run(command, env=environment, stdout=subprocess.PIPE).stdout == shown


@pytest.mark.parametrize("flush", [False, True])
def test_a_reader_that_leaves_ends_a_command_quietly(flush):
    """Whether the pipe breaks in the middle or when all is flushed at the end."""
    command = [sys.executable, "-c", f"{COMMAND}input(); print('x', flush={flush})"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.stderr.read() == b""
    assert process.wait() == READER_LEFT


def test_ctrl_c_in_an_import_is_one_line():
    """Whatever an import makes of an exception: here it goes on."""
    script = (
        "import time\nfrom paco_ds.command import one_line_on_interrupt\nwith one_line_on_interrupt():\n"
        "    print('ready', flush=True)\n    while True:\n"
        "        try: time.sleep(60)\n        except BaseException: pass"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "interrupted\n"
    assert process.returncode == INTERRUPTED


@pytest.mark.parametrize("builder", [False, True])
def test_names_that_are_not_read_as_utf_8_are_refused(builder, monkeypatch, capsys):
    """In a locale of ISO-8859-1 classes would have other names than on other hosts."""
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "iso8859-1")
    if builder:
        assert build(["check", "nowhere"]) == 2
    else:
        with pytest.raises(SystemExit), report_user_errors():
            pytest.fail("the command began")
    said = "error: the locale of this shell reads names of files as iso8859-1, not UTF-8: set PYTHONUTF8=1\n"
    assert capsys.readouterr().err == said


def test_the_c_locale_reads_names_as_utf_8():
    """Python coerces it, or takes UTF-8 by itself where that is off."""
    for given in ({}, {"PYTHONCOERCECLOCALE": "0"}):
        kept = {name: value for name, value in os.environ.items() if name not in ("LC_ALL", "PYTHONUTF8")}
        command = [sys.executable, "-c", f"{COMMAND}print('began')"]
        environment = kept | {"LC_ALL": "C"} | given
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == "began\n"
