"""Single requests to a web server: answers are read up to a bound, and a busy server is not a missing file.

fsspec keeps the connections and reads its settings (`FSSPEC_HTTP_CLIENT_KWARGS`, ...). Its own requests read an answer
to its end, however long, follow redirects anywhere, and take an error of any status for a missing file.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import Any

import aiohttp
from fsspec.asyn import sync
from fsspec.implementations.http import HTTPFileSystem
from yarl import URL

from paco_ds.data.remote import Fsspec
from paco_ds.errors import DataError

_MOST_REDIRECTS = 5
_SECRET = {"headers", "cookies", "auth"}  # what may be, of the options of a session and of a request
_REDIRECTS = (301, 302, 303, 307, 308)
_MISSING, _DENIED, _NO_HEAD = (404, 410), (401, 403, 407), (405, 501)


class RefusedRequestError(OSError):
    """A status other than success, to be tried again.

    Attributes:
        retry_after: seconds that the server asks to wait; 0 if it does not ask.
    """

    def __init__(self, status: int, reason: str | None, retry_after: str) -> None:
        super().__init__(f"{status} {reason or ''}".strip())
        self.retry_after = _seconds(retry_after)


class Web(Fsspec):
    """http and https.

    Args:
        redirects: whether a redirect to another host is followed, by https.
    """

    def __init__(self, url: str, redirects: bool) -> None:
        super().__init__(url)
        self.redirects = redirects

    def read(self, name: str, span: tuple[int, int] | None, limit: float, most: int) -> bytes:
        return bytes(sync(self.fs.loop, self._get, self._path(name), span, most, timeout=limit))

    def about(self, name: str, limit: float) -> tuple[int, str]:
        size, version = sync(self.fs.loop, self._about, self._path(name), timeout=limit)
        return int(size), str(version)

    def sizes(self, limit: float) -> None:
        return None  # a web page may list names, but no sizes

    def find(self, folder: str, limit: float) -> dict[str, tuple[int, str]]:
        raise DataError("a web server does not list files with sizes: copy the folder first")

    async def _get(self, url: str, span: tuple[int, int] | None, most: int) -> bytes:
        """The body, or its first `most` + 1 bytes: what is longer is not read."""
        parts, size = [], 0
        headers = {"Range": f"bytes={span[0]}-{span[1] - 1}"} if span else {}
        async with self._answer("GET", url, headers) as answer:
            async for part in answer.content.iter_any():
                parts.append(part)
                size += len(part)
                if size > most:
                    break
        return b"".join(parts)[: most + 1]

    async def _about(self, url: str) -> tuple[int, str]:
        """(bytes, identifier of the version) by HEAD; a server without it is asked for the first byte."""
        async with self._answer("HEAD", url, {}, accept=_NO_HEAD) as answer:
            size, version = answer.headers.get("Content-Length"), _version(answer.headers)
            known = answer.status not in _NO_HEAD and size is not None
        if not known:
            async with self._answer("GET", url, {"Range": "bytes=0-0"}) as answer:
                whole = answer.headers.get("Content-Length")
                size = answer.headers.get("Content-Range", "").rpartition("/")[2] if answer.status == 206 else whole
                version = _version(answer.headers)
        if size is None or not size.isdecimal() or len(size) > 18:
            raise NotImplementedError("the server does not report the file's size")
        return int(size), version

    @asynccontextmanager
    async def _answer(
        self, method: str, url: str, headers: Mapping[str, str], accept: tuple[int, ...] = ()
    ) -> AsyncIterator[Any]:
        """The answer to a request, after redirects.

        Raises:
            FileNotFoundError, PermissionError, RefusedRequestError: by its status, unless that is one to `accept`.
        """
        options = dict(self.fs.kwargs)
        sent = {"Accept-Encoding": "identity", **options.pop("headers", {}), **headers}
        session: aiohttp.ClientSession = await self.fs.set_session()
        place = first = self.fs.encode_url(url)
        for _ in range(_MOST_REDIRECTS + 1):
            async with session.request(method, place, headers=sent, **{**options, "allow_redirects": False}) as answer:
                if answer.status in _REDIRECTS and "Location" in answer.headers:
                    place = self._redirected(place, answer.headers["Location"])
                    if place.origin() != first.origin():
                        session = await self._for_others.set_session()
                        sent = {"Accept-Encoding": "identity", **headers}
                        options = {name: options[name] for name in options.keys() - _SECRET}
                    continue
                if answer.status in _MISSING:
                    raise FileNotFoundError(url)
                if answer.status in _DENIED:
                    raise PermissionError(
                        f"{answer.status} {answer.reason}; credentials come with the URL or from the environment, "
                        "see Secrets in docs/data.md"
                    )
                if answer.status >= 300 and answer.status not in accept:
                    raise RefusedRequestError(answer.status, answer.reason, answer.headers.get("Retry-After", ""))
                yield answer
                return
        raise DataError(f"{url} is redirected more than {_MOST_REDIRECTS} times")

    @cached_property
    def _for_others(self) -> HTTPFileSystem:
        """Keeps the connections to hosts that redirects lead to: without the headers, cookies and password that the
        environment gives, which are for the first host."""
        client = {name: value for name, value in self.fs.client_kwargs.items() if name not in _SECRET}
        return HTTPFileSystem(client_kwargs=client, loop=self.fs.loop, skip_instance_cache=True)

    def _redirected(self, place: URL, location: str) -> URL:
        """Where a redirect leads, with the credentials of the URL if it is the same scheme, host and port.

        Raises:
            DataError: to another host, if that is not allowed; to another scheme but https.
        """
        target = place.join(URL(location))
        if target.scheme not in {place.scheme, "https"}:
            raise DataError(f"{place} is redirected to {target}, another scheme: give an address without a redirect")
        if target.origin() == place.origin():
            return target.with_user(place.user).with_password(place.password)
        if target.host == place.host:
            return target
        if not self.redirects:
            raise DataError(
                f"{place} is redirected to {target}, another host: give that address, or set data.storage.redirects "
                "to follow redirects to other hosts by https"
            )
        if target.scheme != "https":
            raise DataError(f"{place} is redirected to {target}, another host without https: give that address")
        return target


def _version(headers: Mapping[str, str]) -> str:
    return headers.get("ETag") or headers.get("Last-Modified", "")


def _seconds(retry_after: str, now: datetime | None = None) -> float:
    """Seconds of a Retry-After header, a number or a date, counted from `now`."""
    if retry_after.isdecimal():
        return float(retry_after[:9])
    try:
        then = parsedate_to_datetime(retry_after)
    except ValueError:
        return 0.0
    return (then - (now or datetime.now(UTC))).total_seconds() if then.tzinfo else 0.0
