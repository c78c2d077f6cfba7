"""Starting a job again: after what, how often, and never beside what is left of the last start."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from paco_ds.distributed.hostfile import hosts_left, on_hosts
from paco_ds.errors import UserError
from paco_ds.training.outcome import Outcome, read_outcome

# a job whose n-th start runs the n-th of its scripts, or the last
JOB = """
import os, signal, subprocess, sys, time
from pathlib import Path
from paco_ds.training.outcome import Outcome
run = Path(sys.argv[1])
start = len(list(run.glob("start-*")))
(run / f"start-{start}").touch()
def save(step):
    (run / f"checkpoints/step-{step:08d}").mkdir(parents=True)
def end(status, reason="as told"):
    Outcome(status, reason).write(run)
    sys.exit(status)
exec(sys.argv[2:][min(start, len(sys.argv) - 3)])
"""
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


def command(folder, *scripts, restarts=2):
    """Words that keep a job of these scripts running in a folder, with waits that are no waits."""
    call = (
        "import sys; from paco_ds.training import keep_running as k; k.LONGEST_WAIT = 0.02; k.LEAVE = 0.5; "
        "sys.exit(k.main(sys.argv[1:]))"
    )
    job = (sys.executable, "-c", JOB, folder, *scripts)
    return [sys.executable, "-c", call, "--restarts", str(restarts), "--run", folder, "--", *job]


@pytest.fixture
def keep(tmp_path):
    """`keep(script, ..., restarts=)`: (exit status, starts) of such a job in tmp_path."""

    def run(*scripts, restarts=2):
        status = subprocess.run(command(tmp_path, *scripts, restarts=restarts), timeout=120).returncode
        return status, len(list(tmp_path.glob("start-*")))

    return run


def test_a_killed_job_is_started_again_until_it_is_finished(keep, capfd):
    assert keep(KILLED, "sys.exit(247)", "end(75)", "end(76)", "end(0)", restarts=4) == (0, 5)
    said = capfd.readouterr().err
    assert "keep-running: killed by signal 9 (status 75): restart 1 in" in said
    assert "keep-running: as told (status 76): restart 4 in" in said


@pytest.mark.parametrize("status", [2, 70, 74])
def test_what_would_come_again_ends_it(status, keep):
    """Whatever the launcher makes of it."""
    assert keep(f"Outcome({status}, 'why').write(run); sys.exit(1)") == (status, 1)
    assert keep(f"sys.exit({status})") == (status, 2)


def test_a_launcher_that_ends_with_0_before_its_run_is_not_believed(keep):
    assert keep("pass", "end(0)") == (0, 2)


def test_it_gives_up_after_starts_without_a_checkpoint_and_a_checkpoint_resets_the_count(keep, capfd, tmp_path):
    assert keep(KILLED, KILLED, f"save(8); {KILLED}", f"save(12); {KILLED}", "sys.exit(1)", restarts=2) == (1, 7)
    assert (
        "gave up: 3 starts in a row wrote no checkpoint; the last: ended with status 1 and with"
        in capfd.readouterr().err
    )
    assert read_outcome(tmp_path).reason == "ended with status 1 and without a word"


def test_no_restarts_is_one_start(keep):
    assert keep(f"save(3); {KILLED}", restarts=0) == (75, 1)


def test_the_next_start_waits_for_ranks_that_a_dead_launcher_left(keep, tmp_path):
    """They are told to stop, since they cannot know how the launcher ended, and write their checkpoint first."""
    rank = "import signal, sys, time; signal.signal(15, lambda *_: (time.sleep(0.5), sys.exit(75))); time.sleep(100)"
    launcher = (
        f"orphan = subprocess.Popen([sys.executable, '-c', {rank!r}]); time.sleep(0.3); "
        f"(run / 'pid').write_text(str(orphan.pid)); {KILLED}"
    )
    alone = "(run / 'met').write_text(str(Path('/proc', (run / 'pid').read_text()).exists())); end(0)"
    assert keep(launcher, alone) == (0, 2)
    assert (tmp_path / "met").read_text() == "False"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_request_to_stop_reaches_the_job_and_nothing_is_started_again(number, tmp_path):
    script = "signal.signal(15, lambda *_: end(75)); (run / 'ready').touch(); time.sleep(100)"
    keeper = subprocess.Popen(command(tmp_path, script))
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    keeper.send_signal(number)
    assert keeper.wait(timeout=60) == 75
    assert len(list(tmp_path.glob("start-*"))) == 1


def test_ranks_of_a_host_end_together(tmp_path):
    """The others are told when one fails, and killed if they do not hear."""
    deaf = (
        "import os, signal, time; signal.signal(15, signal.SIG_IGN); "
        "time.sleep(100 * (os.environ['RANK'] == '1')); exit(3)"
    )
    call = (
        "import sys; from paco_ds.training import keep_running as k; k.LEAVE = 0.3; from pathlib import Path; "
        f"job = lambda: k.local_ranks([sys.executable, '-c', {deaf!r}], 2); sys.exit(k.Keeper(Path('.'), 0, job).run())"
    )
    began = time.monotonic()
    assert subprocess.run([sys.executable, "-c", call], cwd=tmp_path).returncode == 3
    assert time.monotonic() - began < 30


def test_hosts_that_do_not_answer_are_left_out_and_the_ranks_are_those_that_can_share_a_step(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("# two racks\nnode1 slots=8\nnode2 slots=8 # new\n\nnode3 slots=8\n")
    up = {"node1", "node3"}
    assert hosts_left(hosts, 24, up.__contains__) == {"node1": 8, "node3": 4}
    assert hosts_left(hosts, 24, lambda host: True) == {"node1": 8, "node2": 8, "node3": 8}
    assert hosts_left(hosts, None, up.__contains__) == {"node1": 8, "node3": 8}
    with pytest.raises(UserError, match=r"no host of .* answers to ssh: node1, node2, node3"):
        hosts_left(hosts, 24, lambda host: False)
    words = ["deepspeed", "--hostfile", "hosts", "train.py", "--expect-ranks=24"]
    assert on_hosts(words, Path("left"), 12) == [
        "deepspeed", "--force_multi", "--hostfile", "left", "train.py", "--expect-ranks=12"
    ]  # fmt: skip


def test_an_outcome_that_is_damaged_is_none(tmp_path):
    Outcome(75, "asked to stop", 40).write(tmp_path)
    assert read_outcome(tmp_path).step == 40
    for damage in ("", "[" * 100_000, "{}", '{"status": 0'):
        (tmp_path / "outcome.json").write_text(damage)
        assert read_outcome(tmp_path) is None


def test_ranks_end_when_their_keeper_is_killed(tmp_path):
    """Through whatever launcher lies between."""
    rank = (
        "from paco_ds.training.stop_request import StopRequest; stop = StopRequest(); stop.begin(); "
        "(run / 'pid').write_text(str(os.getpid()))\nwhile not stop(): time.sleep(0.02)\nend(75, stop.reason)"
    )
    keeper = subprocess.Popen(command(tmp_path, rank))
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.01)
    own = psutil.Process(int((tmp_path / "pid").read_text()))
    keeper.kill()
    keeper.wait()
    own.wait(timeout=60)
    assert read_outcome(tmp_path).reason == "its launcher died"
