"""Single requests to remote storage: one try each, within a time limit. `storage` repeats them."""

from __future__ import annotations

import queue
import shlex
import shutil
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Callable, Mapping
from typing import IO, Any, Protocol, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem, sync

from paco_ds.errors import DataError
from paco_ds.files import read_at_most

T = TypeVar("T")
# their files are visible while they are written; object stores show an upload only when it is complete
_IN_PLACE = ("sftp", "ssh", "ftp", "smb", "hdfs", "webhdfs", "arrow_hdfs")


_MOST_SAID = 2**16  # bytes of a command's errors
_PIECE = 2**20


def refuse_unknown_service(url: str, scheme: str) -> None:
    """Raise DataError, with common services, unless fsspec supports this kind of URL."""
    known = {*fsspec.available_protocols()}
    if scheme not in known:
        common = sorted(known & {"s3", "gs", "az", "abfs", "http", "https", "hf", "sftp", "memory"})
        raise DataError(f"{url}: fsspec does not support {scheme!r}; it supports {', '.join(common)} and more")


def inside(place: str, name: str) -> str:
    """The path or URL of a file or folder in another; a query, such as a signature of the folder, stays at the end."""
    folder, mark, query = place.partition("?") if "://" in place else (place, "", "")
    return f"{folder.rstrip('/')}/{name}{mark}{query}"


class Remote(Protocol):
    """One try of each request, at most `limit` seconds long."""

    def read(self, name: str, span: tuple[int, int] | None, limit: float, most: int) -> bytes:
        """A file's bytes or a range of them; of an answer longer than `most`, at least one byte more."""

    def about(self, name: str, limit: float) -> tuple[int, str]:
        """Bytes of a file, and an identifier of its version."""

    def sizes(self, limit: float) -> dict[str, int] | None: ...

    def find(self, folder: str, limit: float) -> dict[str, tuple[int, str]]:
        """Of every file below a folder what `about` says of it."""

    def put(self, local: str, name: str, limit: float) -> None: ...

    def remove(self, name: str, limit: float) -> None: ...


class Fsspec:
    def __init__(self, url: str) -> None:
        # a shared instance would bring the options and cached listings of other users in the process
        self.fs, self.root = fsspec.core.url_to_fs(url, skip_instance_cache=True)
        protocols = {self.fs.protocol} if isinstance(self.fs.protocol, str) else {*self.fs.protocol}
        self.in_place = bool(protocols & {*_IN_PLACE})

    def read(self, name: str, span: tuple[int, int] | None, limit: float, most: int) -> bytes:
        start, end = span or (None, None)
        return bytes(self._call(limit, "cat_file", self._path(name), start=start, end=end))

    def about(self, name: str, limit: float) -> tuple[int, str]:
        self.fs.invalidate_cache()
        info = self._call(limit, "info", self._path(name))
        if info.get("type") == "directory":
            raise FileNotFoundError(name)
        if info.get("size") is None:
            raise NotImplementedError("the server does not report the file's size")
        return int(info["size"]), _version(info)

    def sizes(self, limit: float) -> dict[str, int] | None:
        self.fs.invalidate_cache()
        try:
            entries = self._call(limit, "ls", self.root, detail=True)
        except FileNotFoundError:
            return {}
        return {e["name"].rpartition("/")[2]: int(e["size"]) for e in entries if e["type"] == "file"}

    def put(self, local: str, name: str, limit: float) -> None:
        path = self._path(name)
        if not self.in_place:
            self._call(limit, "put_file", local, path)
            return
        folder, _, last = path.rpartition("/")
        self.fs.makedirs(folder, exist_ok=True)
        partial = f"{folder}/.{last}.{uuid.uuid4().hex}"
        try:
            self._call(limit, "put_file", local, partial)
            self._call(limit, "mv", partial, path)
        except BaseException:
            if self.fs.exists(partial):
                self.fs.rm_file(partial)
            raise

    def find(self, folder: str, limit: float) -> dict[str, tuple[int, str]]:
        self.fs.invalidate_cache()
        start = self._path(folder).rstrip("/")
        found = self._call(limit, "find", start, detail=True)
        return {name.removeprefix(start).lstrip("/"): (int(i["size"]), _version(i)) for name, i in found.items()}

    def remove(self, name: str, limit: float) -> None:
        self._call(limit, "rm_file", self._path(name))

    def _path(self, name: str) -> str:
        return inside(self.root, name)

    def _call(self, limit: float, method: str, *args: Any, **kwargs: Any) -> Any:
        own = getattr(self.fs, f"_{method}", None)
        if isinstance(self.fs, AsyncFileSystem) and own is not None:
            return sync(self.fs.loop, own, *args, timeout=limit, **kwargs)  # also cancels the request
        return _within(limit, lambda: getattr(self.fs, method)(*args, **kwargs))


class Pipe:
    """A command whose output is a file; it runs without a shell."""

    def __init__(self, url: str) -> None:
        self.command = shlex.split(url.removeprefix("pipe:"))

    def read(self, name: str, span: tuple[int, int] | None, limit: float, most: int) -> bytes:
        if span is not None:
            raise DataError("a pipe: command gives whole files, not ranges: set data.cache")
        return self._run(name, limit, lambda output: read_at_most(output, most))

    def about(self, name: str, limit: float) -> tuple[int, str]:
        return self._run(name, limit, lambda output: sum(map(len, iter(lambda: output.read(_PIECE), b"")))), ""

    def _run(self, name: str, limit: float, take: Callable[[IO[bytes]], T]) -> T:
        """What `take` makes of the command's output; a command that has more to say is ended."""
        command = [part.replace("{name}", name) for part in self.command]
        if shutil.which(command[0]) is None:
            raise DataError(f"there is no command {command[0]!r} to run: correct data.shards, or install it")
        pipe = subprocess.PIPE
        with (
            tempfile.TemporaryFile() as errors,
            subprocess.Popen(command, stdout=pipe, stderr=errors, bufsize=0) as run,  # so that closing waits for none
        ):
            output = run.stdout
            assert output is not None
            try:
                taken, more = _within(limit, lambda: (take(output), output.read(1)))
                if not more and run.wait(limit):
                    errors.seek(0)
                    said = errors.read(_MOST_SAID).decode(errors="replace").strip().splitlines()
                    raise OSError(f"the command ended with {run.returncode}" + (f": {said[-1]}" if said else ""))
                return taken
            finally:
                run.kill()

    def sizes(self, limit: float) -> dict[str, int] | None:
        return None

    def put(self, local: str, name: str, limit: float) -> None:
        raise NotImplementedError("a pipe: command cannot be written to")

    def find(self, folder: str, limit: float) -> dict[str, tuple[int, str]]:
        raise DataError("a pipe: command does not list files")

    def remove(self, name: str, limit: float) -> None:
        raise NotImplementedError("a pipe: command cannot be written to")


def _version(info: Mapping[str, Any]) -> str:
    """What a service tells of a file that changes when it is written again; empty where it tells nothing."""
    return next((str(info[k]) for k in ("ETag", "etag", "LastModified", "mtime", "created") if info.get(k)), "")


def _within(seconds: float, function: Callable[[], T]) -> T:
    """The function's result, or TimeoutError; its thread then keeps running, since it cannot be stopped."""
    results: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((True, function()))
        except BaseException as error:
            results.put((False, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        good, value = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer in {seconds:.0f} s") from None
    if not good:
        raise value
    return value
