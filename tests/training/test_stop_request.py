"""Requests to stop, and what they do before and after there is something to save."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from paco_ds.command import INTERRUPTED
from paco_ds.distributed.launchers import KEEPER
from paco_ds.errors import RESUMABLE
from paco_ds.training.stop_request import StopRequest

# a rank that says what it was told; the main thread waits in a call that no Python handler interrupts
RANK = """
import select, sys, time
from paco_ds.training.stop_request import StopRequest
stop = StopRequest()
if "begun" in sys.argv:
    stop.begin()
print("ready", flush=True)
while not stop():
    time.sleep(0.02)
print(stop.reason, flush=True)
if "lingers" in sys.argv:
    time.sleep(60)
"""


@pytest.fixture
def rank(monkeypatch):
    """`rank(word, ...)` starts the script above and waits until it is ready."""
    for name in ("RANK", KEEPER):
        monkeypatch.delenv(name, raising=False)
    started = []

    def start(*words, before=(), **environment):
        command = [*before, sys.executable, "-c", RANK, *words]
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_asks_and_the_handlers_of_before_come_back(number):
    before = [signal.getsignal(n) for n in signal.Signals if n not in (signal.SIGKILL, signal.SIGSTOP)]
    stop = StopRequest()
    stop.begin()
    assert not stop()
    os.kill(os.getpid(), number)
    assert stop()
    assert stop.reason == number.name
    stop.close()
    assert [signal.getsignal(n) for n in signal.Signals if n not in (signal.SIGKILL, signal.SIGSTOP)] == before


def test_before_the_first_step_a_request_ends_the_process_with_one_line(rank):
    process = rank("lingers")
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=60)[1] == "stopped before its first step (SIGUSR1)\n"
    assert process.returncode == RESUMABLE


def test_a_second_ctrl_c_ends_at_once(rank):
    process = rank("begun", "lingers")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "SIGINT\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == INTERRUPTED
    assert process.stderr.read().startswith("interrupted twice: ended at once")


def test_under_nohup_a_closed_terminal_is_not_heard(rank):
    process = rank("begun", before=("nohup",))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "SIGTERM\n"


def test_a_closed_terminal_is_a_request_and_to_print_there_is_no_error(tmp_path):
    """Else the lines before the checkpoint would end the run before it is written."""
    said = "print('a line of the progress', flush=True); open(sys.argv[1], 'w').write(stop.reason)"
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", RANK + said, str(tmp_path / "said"), "begun"])
    while b"ready" not in os.read(terminal, 1000):
        pass
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (tmp_path / "said").read_text() == "SIGHUP"


@pytest.mark.parametrize("name", ["deepspeed", "torchrun"])
def test_the_death_of_a_launcher_asks_to_stop(name, rank, tmp_path):
    """Of the parent, or of its parent, while the process between them lives."""
    between = "import subprocess, sys; subprocess.run(sys.argv[1:])"
    Path(tmp_path, name).write_text(between)
    launcher = (sys.executable, str(tmp_path / name), sys.executable, "-c", between)
    process = rank("begun", before=launcher, RANK="0")
    process.kill()  # the launcher; its output stays open
    assert process.stdout.readline() == "its launcher died\n"


def test_a_run_that_was_started_by_hand_outlives_its_shell(rank, tmp_path):
    """No launcher set RANK."""
    shell = rank("begun", before=("sh", "-c", '"$@"; true', "sh"))
    (own,) = psutil.Process(shell.pid).children()
    shell.kill()
    time.sleep(1.5)
    assert own.is_running()
    own.terminate()
    assert shell.stdout.readline() == "SIGTERM\n"
