"""Storage: a directory of files, local or behind any fsspec URL, read and written whole or by ranges.

Remote requests are retried with exponential backoff and jitter. Credentials, endpoints and other options of a service
come from its environment variables (`AWS_*`, `FSSPEC_S3_*`, ...). Nothing that a URL names is executed, except a
`pipe:` command if `data.allow_pipe_urls` permits it.
"""

from __future__ import annotations

import hashlib
import os
import random
import shlex
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from paco_ds.config.data import DataSettings, StorageSettings
from paco_ds.data.cache import FileCache
from paco_ds.data.remote import Fsspec, Pipe, Remote, inside, refuse_unknown_service
from paco_ds.errors import DataError, UnreachableError, redacted
from paco_ds.files import is_url, read_at_most, storage_errors, whole_file

T = TypeVar("T")
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds between tries
_LONGEST_ASKED = 60.0  # seconds that a server may ask to wait
_MOST_WHOLE = 2**30  # bytes of a file of unknown size: a manifest of a million shards has 300 MB
_MIB = 2**20
_LISTING = 60  # times the limit of a request, for listing a million files
_PIECE = 16 * _MIB  # of a whole file, so that a lost connection costs no more than this
_EXECUTING = ("pipe", "cmd", "shell", "exec", "reference")  # a reference file is a template that is executed
# errors that a retry does not change; the names are botocore's, which may not be installed
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, ImportError)
_FINAL_NAMES = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "NoRegionError")


class MissingFile(DataError):  # noqa: N818 (some callers expect it)
    """There is no file of that name."""


class Storage:
    """A directory of files. `url` is a local path or any fsspec URL; files are named relative to it.

    Its attribute `url` has no credentials: it is for messages and files.

    It can be pickled: each process opens its connections at its first request. Thread-safe.

    Args:
        cache: cache of whole remote files on this host, see `open_whole`.
        allow_pipe_urls: permits `pipe:COMMAND`, run once for each file with `{name}` replaced; its output is the file.

    Raises:
        DataError: a URL that would execute something, or that fsspec does not support.
    """

    def __init__(
        self,
        url: str | Path,
        settings: StorageSettings | None = None,
        *,
        cache: FileCache | None = None,
        allow_pipe_urls: bool = False,
    ) -> None:
        self._address = _without_masks(str(url).removeprefix("file://"))
        self.settings, self.cache = settings or StorageSettings(), cache
        self.allow_pipe_urls = allow_pipe_urls
        self.is_local = not is_url(self._address)
        self.url = self._address if self.is_local else redacted(self._address)
        self._lock = threading.Lock()
        self._remote: tuple[int, Remote] | None = None
        self._refuse_what_would_execute()

    def __reduce__(self) -> tuple[Callable[..., Storage], tuple[Any, ...]]:
        return _restore, (self._address, self.settings, self.cache, self.allow_pipe_urls)

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    @property
    def is_pipe(self) -> bool:
        """Whether files are outputs of a command: read whole, of unknown size until then."""
        return self._address.startswith("pipe:")

    @property
    def local_directory(self) -> Path:
        """The directory of a local storage; DataError for a remote one."""
        if not self.is_local:
            raise DataError(f"{self.url} is remote, but a local directory is needed here: copy it first")
        return Path(self.url)

    def place(self, name: str) -> str:
        """Path or URL of a file, for messages."""
        return inside(self.url, name) if not self.is_pipe else self.url.replace("{name}", name)

    def read(self, name: str, expected: int = 0) -> bytes:
        """All bytes of a file, but no more than one beyond the `expected` number, if that is known.

        Raises:
            MissingFile: there is no such file.
            UnreachableError: it cannot be read in `data.storage.tries` tries.
            DataError: it cannot be read at all, or is too large to be read whole.
        """
        most = expected or _MOST_WHOLE
        if self.is_local:
            found = self._locally(name, lambda path: _read_regular(path, most))
        else:
            found = self._ask(
                f"read {self.place(name)}",
                lambda remote, limit: remote.read(name, None, limit + expected / _MIB, most),
            )
        if len(found) > _MOST_WHOLE > expected:
            raise DataError(f"{self.place(name)} has more than {_MOST_WHOLE} bytes: is it the right file?")
        return found[: most + 1]

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """`size` bytes of a file from byte `start` on; fewer only if a local file ends before.

        Raises:
            MissingFile, UnreachableError, DataError: as `read`; DataError also for a server without ranges.
        """
        if self.is_local:
            with self._locally(name, lambda path: path.open("rb", buffering=0)) as file:
                return os.pread(file.fileno(), size, start)
        what = f"read bytes {start} to {start + size} of {self.place(name)}"

        def one_range(remote: Remote, limit: float) -> bytes:
            found = remote.read(name, (start, start + size), limit + size / _MIB, size)
            if len(found) > size:
                raise DataError(f"cannot {what}: the server sends the whole file instead of a range")
            if len(found) < size:
                raise EOFError(f"only {len(found)} of {size} bytes were received")
            return found

        return self._ask(what, one_range) if size else b""

    def size(self, name: str) -> int:
        """Bytes of a file; MissingFile if there is none."""
        if self.is_local:
            return self._locally(name, lambda path: path.stat().st_size)
        return self._ask(f"find {self.place(name)}", lambda remote, limit: remote.about(name, limit))[0]

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""
        try:
            self.size(name)
        except MissingFile:
            return False
        return True

    def sizes(self) -> dict[str, int] | None:
        """Bytes of every file directly in the directory, by name, from one listing; None without listings."""
        if self.is_local:
            if not Path(self.url).is_dir():
                return {}
            with os.scandir(self.url) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        return self._ask(f"list {self.url}", lambda remote, limit: remote.sizes(limit))

    def stamp(self, name: str) -> int:
        """A number that changes when the file is written again: its mtime in ns, or a digest of the ETag or time that
        the service gives; 0 if it gives none.

        Raises:
            MissingFile: there is no such file.
        """
        if self.is_local:
            return self._locally(name, lambda path: path.stat().st_mtime_ns)
        return _stamp(self._ask(f"find {self.place(name)}", lambda remote, limit: remote.about(name, limit))[1])

    def find(self, folder: str) -> dict[str, tuple[int, int]]:
        """(bytes, `stamp`) of every file below a folder, by its relative name; empty if there is no such folder.

        Raises:
            DataError: the service has no listings.
        """
        if self.is_local:
            start = Path(self.url, folder)
            files = {str(path.relative_to(start)): path.stat() for path in start.rglob("*") if path.is_file()}
            return {name: (about.st_size, about.st_mtime_ns) for name, about in files.items()}
        found = self._ask(f"list {self.place(folder)}", lambda remote, limit: remote.find(folder, _LISTING * limit))
        return {name: (size, _stamp(version)) for name, (size, version) in found.items()}

    @contextmanager
    def write(self, name: str) -> Iterator[BinaryIO]:
        """Open a binary file for writing that is created only when complete; an error in the block creates nothing.

        Remote files are first written to local disk (TMPDIR), so that an upload can be retried.

        Raises:
            StorageError: a disk of this host is full and the like.
        """
        if self.is_local:
            path = Path(self.url) / name
            with storage_errors(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as file:
                yield file
            return
        with (
            storage_errors(Path(tempfile.gettempdir())),
            tempfile.NamedTemporaryFile(prefix="paco_ds-upload-") as file,
        ):
            yield file  # type: ignore[misc]
            file.flush()
            size = os.path.getsize(file.name)
            self._ask(
                f"write {self.place(name)}", lambda remote, limit: remote.put(file.name, name, limit + size / _MIB)
            )

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        if self.is_local:
            self._locally(name, lambda path: path.unlink(missing_ok=True))
            return
        with suppress(MissingFile):
            self._ask(f"remove {self.place(name)}", lambda remote, limit: remote.remove(name, limit))

    def parent(self) -> tuple[Storage, str]:
        """For a URL of a file: the storage of its directory, and the file's name."""
        folder, _, name = self._address.rpartition("/")
        place = folder or ("/" if self.url.startswith("/") else ".")
        return Storage(place, self.settings, cache=self.cache, allow_pipe_urls=self.allow_pipe_urls), name

    def inside(self, folder: str) -> Storage:
        """The storage of a folder in this directory."""
        return Storage(
            inside(self._address, folder), self.settings, cache=self.cache, allow_pipe_urls=self.allow_pipe_urls
        )

    def open_whole(self, name: str, size: int) -> BinaryIO:
        """Open a local file with all bytes: the file itself, or its copy in the cache.

        Raises:
            DataError: it does not have `size` bytes, or it is remote and there is no cache.
        """
        if self.is_local:
            return self._locally(name, lambda path: path.open("rb", buffering=0))
        if self.cache is None:
            raise DataError(
                f"{self.place(name)} is remote and there is no cache: set data.cache.directory and data.cache.bytes"
            )
        found, version = (
            (size, "") if self.is_pipe else self._ask("find " + name, lambda remote, limit: remote.about(name, limit))
        )
        if found != size:
            raise DataError(f"{self.place(name)} has {found} bytes, not {size}: copy it again or rebuild it")
        return self.cache.open(f"{self.place(name)} {size} {version}", size, lambda file: self._fetch(name, size, file))

    def _fetch(self, name: str, size: int, file: BinaryIO) -> None:
        if self.is_pipe:
            raw = self.read(name, size)
            if len(raw) != size:
                raise DataError(f"{self.place(name)} gives {len(raw)} bytes, not {size}")
            file.write(raw)
            return
        for start in range(0, size, _PIECE):
            file.write(self.read_range(name, start, min(_PIECE, size - start)))

    def _locally(self, name: str, function: Callable[[Path], T]) -> T:
        path = Path(self.url) / name
        try:
            return function(path)
        except FileNotFoundError as error:
            raise MissingFile(f"{path} is missing") from error
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error

    def _ask(self, what: str, request: Callable[[Remote, float], T]) -> T:
        """Repeat a request until it succeeds, its error is final, or the tries are used up: an UnreachableError."""
        began, last, asked = time.monotonic(), "", 0.0
        for number in range(self.settings.tries):
            if number:
                wait = min(_FIRST_WAIT * 2 ** (number - 1), _LONGEST_WAIT)
                time.sleep(max(wait * random.SystemRandom().uniform(0.5, 1), min(asked, _LONGEST_ASKED)))
            try:
                return request(self._connected(), self.settings.timeout)
            except DataError:
                raise
            except FileNotFoundError as error:
                raise MissingFile(f"cannot {what}: it is missing") from error
            except _FINAL as error:
                raise DataError(f"cannot {what}: {_reason(error)}") from error
            except Exception as error:  # each service raises its own errors
                last, asked = _reason(error), getattr(error, "retry_after", 0.0)
                if type(error).__name__ in _FINAL_NAMES:
                    raise DataError(
                        f"cannot {what}: {last}; set the credentials of the service in the environment"
                    ) from error
        seconds = time.monotonic() - began
        raise UnreachableError(
            f"cannot {what}: {self.settings.tries} tries in {seconds:.0f} s, the last: {last}. Check that the service "
            f"can be reached from here, or raise data.storage.tries or data.storage.timeout"
        )

    def _connected(self) -> Remote:
        """This process's connection: a fork cannot use sockets and threads of its parent."""
        with self._lock:
            if self._remote is None or self._remote[0] != os.getpid():
                self._remote = os.getpid(), self._connect()
            return self._remote[1]

    def _connect(self) -> Remote:
        if self.is_pipe:
            return Pipe(self._address)
        if self._address.startswith(("http://", "https://")):
            from paco_ds.data.web import Web  # aiohttp takes a while to import

            return Web(self._address, self.settings.redirects)
        return Fsspec(self._address)

    def _refuse_what_would_execute(self) -> None:
        if self.is_local:
            return
        if "::" in self.url:
            raise DataError(f"{self.url} chains file systems with '::'; give the inner URL (data.cache keeps copies)")
        scheme = self.url.partition(":")[0].lower()
        if scheme == "pipe" and self.allow_pipe_urls:
            if "***" in self._address:
                raise DataError(f"{self.url} had credentials that are not kept in files: give data.shards again")
            if "{name}" not in self.url:
                raise DataError(f"{self.url} lacks {{name}}: write it in the command where the name of a file goes")
            try:
                shlex.split(self._address)
            except ValueError as error:
                raise DataError(f"{self.url} cannot be split into words: {error}; close the quote") from error
            return
        if scheme in _EXECUTING:
            raise DataError(
                f"{self.url} would run a command. Give a path or a URL of a storage service"
                + ("; or set data.allow_pipe_urls if you trust the command" if scheme == "pipe" else "")
            )
        refuse_unknown_service(self.url, scheme)


def open_storage(data: DataSettings) -> Storage:
    """The storage of a recipe's shards."""
    cache = FileCache(Path(data.cache.directory), data.cache.bytes) if data.cache else None
    return Storage(data.shards, data.storage, cache=cache, allow_pipe_urls=data.allow_pipe_urls)


def as_storage(place: Storage | str | Path) -> Storage:
    """The storage itself, or the storage of a path or URL."""
    return place if isinstance(place, Storage) else Storage(place)


def _restore(url: str, settings: StorageSettings, cache: FileCache | None, allow_pipe_urls: bool) -> Storage:
    return Storage(url, settings, cache=cache, allow_pipe_urls=allow_pipe_urls)


def _stamp(version: str) -> int:
    digest = hashlib.blake2b(version.encode(), digest_size=8).digest()
    return int.from_bytes(digest, signed=True) if version else 0


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _without_masks(url: str) -> str:
    """A URL from a file that was written without its credentials, `***` for each: those of the environment are used."""
    if "***" not in url or url.startswith("pipe:"):
        return url
    place, _, query = url.replace("://***@", "://").partition("?")
    kept = "&".join(part for part in query.split("&") if not part.endswith("=***"))
    return f"{place}?{kept}" if kept else place


def _read_regular(path: Path, most: int) -> bytes:
    """At most one byte more than `most`; a device may be endless, and a pipe never answer."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DataError(f"{path} is not a file")
    with path.open("rb") as file:
        return read_at_most(file, most)
