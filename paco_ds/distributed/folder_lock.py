"""The lock of a folder that has one writer: a run directory, or a folder of shards."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import tempfile
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from paco_ds.errors import StorageError, UserError
from paco_ds.files import storage_errors

LOCK_FILE = ".lock"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LockHolder:
    """Who holds a lock, as its file says.

    Attributes:
        machine: boot and process namespace in which `pid` is a number.
        ticks: start of the process in the kernel's clock, so that a later process of the same number is not taken
            for it.
        since: when the lock was taken, ISO 8601, UTC.
        token: of this lock alone.
    """

    host: str
    machine: str
    pid: int
    ticks: str
    since: str
    token: str

    @classmethod
    def this_process(cls) -> LockHolder:
        """The holder that this process is."""
        since = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(socket.gethostname(), _machine(), os.getpid(), _start(os.getpid()) or "", since, uuid.uuid4().hex)

    @classmethod
    def of(cls, content: bytes) -> LockHolder | None:
        """The holder that a lock file names; None for one that is empty or damaged."""
        try:
            holder = cls(**json.loads(content))
        except (ValueError, TypeError, RecursionError):
            return None
        texts = all(isinstance(value, str) for key, value in asdict(holder).items() if key != "pid")
        return holder if texts and type(holder.pid) is int and 0 < holder.pid < 2**31 else None

    def is_gone(self) -> bool:
        """Whether its process ended; known only on its own machine."""
        if self.machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # of another user, whose start may not be shown either
        return _start(self.pid) not in (None, self.ticks)


class FolderLock:
    """Sole use of a folder by one process, among all hosts that share its storage.

    `FOLDER/.lock` names the holder and is refreshed while it runs. A lock is stale if its process ended on this
    machine or, from another machine or damaged, if it is not refreshed for a minute by the storage's own clock (those
    of two hosts may differ) or, whatever its date, in a minute of looking on. A stale lock is taken over, so a killed
    run never blocks the next.

    Args:
        use: what is done with the folder, for the message.
        patience: seconds without a refresh after which a lock of another machine is stale.
    """

    def __init__(self, folder: Path, use: str, patience: float = 60.0) -> None:
        self.folder, self.path, self.use, self.patience = folder, folder / LOCK_FILE, use, patience
        self._own = LockHolder.this_process()
        self._over, self._made = threading.Event(), False
        self._beat = threading.Thread(target=self._refresh, name="lock", daemon=True)

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock; the folder is made if it is missing.

        Raises:
            UserError: another process holds it; host, process and start are named.
            StorageError: it cannot be written.
        """
        with storage_errors(self.folder):
            self._made = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
        with storage_errors(self.path):
            while not self._create(self.path):
                found = self._read(self.path)
                if found is None:
                    if self.path.is_symlink():
                        raise StorageError(f"{self.path} is a link to nothing: remove it")
                elif self._is_live(found):
                    raise UserError(self._refusal(LockHolder.of(found)))
                elif self._take_over(found):
                    break
        self._beat.start()

    def check(self) -> None:
        """Check that the folder is still there and this process's alone.

        Raises:
            StorageError: the lock is gone or another's, as after this process was stopped for minutes.
        """
        with storage_errors(self.path):
            found = self._read(self.path)
        if found != self._content():
            holder = LockHolder.of(found or b"")
            who = f"taken over by process {holder.pid} on {holder.host} at {holder.since}" if holder else "gone"
            raise StorageError(f"the lock {self.path} is {who}: nothing more is written there by this process")

    def release(self) -> None:
        """Give the lock up; one that is another's by now stays. A folder made for it and still empty goes too."""
        self._over.set()
        if self._beat.is_alive():
            self._beat.join()
        with suppress(OSError):
            if self._read(self.path) == self._content():
                self.path.unlink()
            if self._made:
                self.folder.rmdir()  # succeeds only if nothing was written

    def _content(self) -> bytes:
        return json.dumps(asdict(self._own)).encode()

    def _create(self, path: Path) -> bool:
        """Create a lock file that names this process; False if there is one."""
        try:
            with path.open("xb", buffering=0) as file:  # O_EXCL: of several, one creates it
                try:
                    file.write(self._content())
                    os.fsync(file.fileno())
                except OSError:
                    path.unlink()
                    raise
        except FileExistsError:
            return False
        return True

    def _read(self, path: Path) -> bytes | None:
        with suppress(FileNotFoundError):
            return path.read_bytes()
        return None

    def _is_live(self, content: bytes) -> bool:
        holder = LockHolder.of(content)
        if holder is not None and holder.machine == _machine():
            return not holder.is_gone()
        return self._is_refreshed()

    def _is_refreshed(self) -> bool:
        """Wait until the lock is refreshed (True), or has been left alone for `patience` (False)."""
        seen, began, said = self._refreshed_at(self.path), time.monotonic(), False
        while seen is not None and self._now() - seen < self.patience > time.monotonic() - began:
            if not said:
                log.warning("%s: waiting up to %g seconds for a sign of its holder", self.path, self.patience)
                said = True
            time.sleep(min(1.0, self.patience / 10))
            again = self._refreshed_at(self.path)
            if again is not None and again != seen:
                return True
            seen = again
        return False

    def _refreshed_at(self, path: Path) -> float | None:
        """Seconds of the storage's clock. The file is opened: NFS then asks its server, not its cache."""
        with suppress(FileNotFoundError), path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
        return None

    def _now(self) -> float:
        """The storage's clock, in seconds."""
        with tempfile.NamedTemporaryFile(prefix=f"{LOCK_FILE}-", dir=self.folder) as probe:
            return os.fstat(probe.fileno()).st_mtime

    def _take_over(self, stale: bytes) -> bool:
        """Replace a stale lock, of several that try to only one; False if this was not the one.

        Who creates the claim of just this lock may replace it, if it is there unchanged after that.
        """
        claim = self.path.with_name(f"{LOCK_FILE}-{hashlib.sha256(stale).hexdigest()[:16]}")
        if not self._create(claim):
            holder, made = LockHolder.of(self._read(claim) or b""), self._refreshed_at(claim)
            if (holder and holder.is_gone()) or (made is not None and abs(self._now() - made) > self.patience):
                claim.unlink(missing_ok=True)  # its process was killed just here
            time.sleep(0.05)
            return False
        if self._read(self.path) != stale:
            claim.unlink(missing_ok=True)
            return False
        with suppress(FileNotFoundError):
            claim.rename(self.path)
        return self._read(self.path) == self._content()

    def _refresh(self) -> None:
        while not self._over.wait(self.patience / 6):
            with suppress(OSError):  # a disk that fails for a moment; `check` tells what lasts
                if self._read(self.path) == self._content():
                    os.utime(self.path)

    def _refusal(self, holder: LockHolder | None) -> str:
        who = "another process"
        if holder is not None:
            who = f"process {holder.pid} on host {holder.host}, which began at {holder.since}"
        return (
            f"{self.folder} is in use already, {self.use} by {who}: wait until it has ended, or choose another folder"
        )


def _machine() -> str:
    """Boot and process namespace: where two processes see the same numbers of processes."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _start(pid: int) -> str | None:
    """Start of a process in ticks of the kernel; empty if it ended and only its status is left, None if not shown."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "" if state in "ZX" else fields[18]
