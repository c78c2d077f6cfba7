"""One folder, one writer: a second is refused by name, and a lock that nobody holds any more blocks nobody."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paco_ds.distributed.folder_lock import LOCK_FILE, FolderLock
from paco_ds.errors import StorageError, UserError

SOON = 0.3  # seconds of patience


def test_a_second_writer_is_refused_with_host_process_and_start(tmp_path):
    """Until the first has ended; then nothing of the lock is left."""
    with FolderLock(tmp_path, "trained") as first:
        holder = json.loads((tmp_path / LOCK_FILE).read_text())
        said = rf"is in use already, trained by process {os.getpid()} on host {socket.gethostname()}, which began at 20"
        with pytest.raises(UserError, match=said) as error:
            FolderLock(tmp_path, "trained").acquire()
        assert holder["since"] in str(error.value)
        first.check()
    assert list(tmp_path.iterdir()) == []
    FolderLock(tmp_path, "trained").acquire()


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path):
    """By its number and start on this host: nobody waits for a minute."""
    script = f"""
import os, signal
from pathlib import Path
from paco_ds.distributed.folder_lock import FolderLock
FolderLock(Path({str(tmp_path)!r}), "trained").acquire()
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], check=False)
    assert (tmp_path / LOCK_FILE).exists()
    began = time.monotonic()
    with FolderLock(tmp_path, "trained") as lock:
        lock.check()
    assert time.monotonic() - began < 5


def test_a_later_process_of_the_same_number_is_not_taken_for_the_holder(tmp_path):
    """Numbers are given again, after a restart of the host above all."""
    changed_lock(tmp_path, ticks="1")
    FolderLock(tmp_path, "trained").acquire()


def test_of_another_host_only_time_tells(tmp_path):
    """Left alone for the patience it is stale, by the storage's clock; refreshed, its holder lives."""
    changed_lock(tmp_path, machine="another", host="node7", pid=1)
    began = time.monotonic()
    FolderLock(tmp_path, "trained", patience=SOON).acquire()
    assert time.monotonic() - began >= SOON / 2
    old = tmp_path / "old"
    changed_lock(old, machine="another", host="node7", pid=1)
    os.utime(old / LOCK_FILE, (time.time() - 3600, time.time() - 3600))
    began = time.monotonic()
    FolderLock(old, "trained").acquire()
    assert time.monotonic() - began < 5


def test_a_lock_dated_in_the_future_is_stale_after_the_same_while(tmp_path, caplog):
    """As a host with a wrong clock leaves it; and what is waited for is said."""
    changed_lock(tmp_path, machine="another", host="node7", pid=1)
    os.utime(tmp_path / LOCK_FILE, (time.time() + 86400, time.time() + 86400))
    began = time.monotonic()
    FolderLock(tmp_path, "trained", patience=SOON).acquire()
    assert SOON / 2 <= time.monotonic() - began < 10
    assert caplog.messages == [f"{tmp_path / LOCK_FILE}: waiting up to 0.3 seconds for a sign of its holder"]


def test_one_that_is_refreshed_on_another_host_is_held(tmp_path, monkeypatch):
    """Seen from a machine where its process number says nothing."""
    with FolderLock(tmp_path, "trained", patience=2.0):
        monkeypatch.setattr("paco_ds.distributed.folder_lock._machine", lambda: "another")
        with pytest.raises(UserError, match="is in use already"):
            FolderLock(tmp_path, "trained", patience=2.0).acquire()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b'{"pid": 1}', b"[" * 100_000, b"null"])
def test_a_lock_that_is_garbage_is_stale_after_a_while(tmp_path, content):
    """As a crash of the host may leave it."""
    (tmp_path / LOCK_FILE).write_bytes(content)
    with FolderLock(tmp_path, "trained", patience=SOON) as lock:
        lock.check()


@pytest.mark.parametrize("pid", [0, -1, 2**40, "1", None, 1.5])
def test_a_number_that_no_process_has_is_garbage(tmp_path, pid):
    """Signals to such numbers would go elsewhere."""
    changed_lock(tmp_path, pid=pid)
    FolderLock(tmp_path, "trained", patience=SOON).acquire()


def test_what_is_in_the_locks_way_is_named(tmp_path):
    """A link to nothing, a folder, a file where the folder should be."""
    (tmp_path / "a" / LOCK_FILE).mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / LOCK_FILE).symlink_to(tmp_path / "nothing")
    (tmp_path / "c").write_text("")
    for name, said in (("a", "a file is in the way"), ("b", "is a link to nothing: remove it"), ("c", "c cannot be")):
        with pytest.raises(StorageError, match=said):
            FolderLock(tmp_path / name, "trained").acquire()
    with pytest.raises(StorageError, match=r"/proc/run cannot be written: .*choose another"):
        FolderLock(Path("/proc/run"), "trained").acquire()


def test_a_folder_removed_or_taken_over_in_mid_run_is_said(tmp_path):
    """Nothing is written there any more, and the lock of the other stays."""
    folder = tmp_path / "run"
    lock = FolderLock(folder, "trained")
    lock.acquire()
    (folder / LOCK_FILE).unlink()
    with pytest.raises(StorageError, match=r"the lock .*\.lock is gone: nothing more is written"):
        lock.check()
    changed_lock(folder, host="node7", pid=12)
    with pytest.raises(StorageError, match=r"is taken over by process 12 on node7 at "):
        lock.check()
    lock.release()
    assert (folder / LOCK_FILE).exists()


def test_of_many_that_find_a_stale_lock_one_takes_it_over(tmp_path):
    """However they meet."""
    changed_lock(tmp_path, ticks="1")
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager:
        start, over, outcomes = manager.Event(), manager.Event(), manager.Queue()
        others = [context.Process(target=try_to_lock, args=(tmp_path, start, over, outcomes)) for _ in range(8)]
        for process in others:
            process.start()
        start.set()
        assert sorted(outcomes.get() for _ in others) == ["held"] + ["refused"] * 7
        over.set()
        for process in others:
            process.join()


def try_to_lock(folder, start, over, outcomes):
    start.wait()
    try:
        FolderLock(folder, "trained").acquire()
    except UserError:
        outcomes.put("refused")
    else:
        outcomes.put("held")
    over.wait()  # alive while the others try


def changed_lock(folder, **entries):
    """The lock file of a process that left it, with other entries."""
    lock = FolderLock(folder, "trained")
    lock.acquire()
    content = json.loads((folder / LOCK_FILE).read_text())
    lock.release()
    folder.mkdir(exist_ok=True)
    (folder / LOCK_FILE).write_text(json.dumps(content | entries))
