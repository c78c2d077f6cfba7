"""Web servers that are busy, never stop, or send a client elsewhere; credentials that are needed but never shown."""

import base64
import functools
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import fsspec
import pytest

from paco_ds.config.data import StorageSettings
from paco_ds.data import storage as storage_module
from paco_ds.data.storage import MissingFile, Storage
from paco_ds.data.web import _seconds
from paco_ds.errors import DataError
from tests.hostile.web import send, send_file, serving

QUICK = StorageSettings(tries=3, timeout=60.0)
CONTENT = bytes(range(256)) * 4


def redirect(request: BaseHTTPRequestHandler, to: str) -> None:
    send(request, 302, Location=to)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that requests wait between tries, which they do not really."""
    found: list[float] = []
    monkeypatch.setattr(storage_module.time, "sleep", found.append)
    return found


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_size_request_to_a_busy_server_is_tried_again(status, waits):
    """As reads are, and neither is a missing file."""
    left = [2, 2]

    def answer(request: BaseHTTPRequestHandler) -> None:
        of_kind = request.command == "GET"
        left[of_kind] -= 1
        send_file(request, CONTENT) if left[of_kind] < 0 else send(request, status, b"busy")

    with serving(answer) as url:
        storage = Storage(url, QUICK)
        assert storage.size("a.tar") == len(CONTENT)
        assert storage.read_range("a.tar", 100, 50) == CONTENT[100:150]
        left[:] = 9, 9
        with pytest.raises(DataError, match=f"find {url}/b.tar: 3 tries .*{status}") as caught:
            storage.size("b.tar")
    assert not isinstance(caught.value, MissingFile)
    assert len(waits) == 6


@pytest.mark.parametrize(("asked", "waited"), [("7", 7), ("100000", 60), ("soon", 0.5), ("-1", 0.5)])
def test_a_server_may_ask_to_wait_within_a_bound(asked, waited, waits):
    """By Retry-After."""
    left = [1]

    def answer(request: BaseHTTPRequestHandler) -> None:
        left[0] -= 1
        send_file(request, CONTENT) if left[0] < 0 else send(request, 429, Retry_After=asked)

    with serving(answer) as url:
        assert Storage(url, QUICK).size("a.tar") == len(CONTENT)
    assert len(waits) == 1
    assert waited / 2 <= waits[0] <= waited


def test_retry_after_may_be_a_date():
    now = datetime(2026, 2, 28, 23, 59, 30, tzinfo=UTC)
    assert _seconds(format_datetime(now + timedelta(minutes=1), usegmt=True), now) == 60


@pytest.mark.parametrize("status", [404, 410])
def test_a_missing_file_is_told_at_once(status, waits):
    with serving(lambda request: send(request, status)) as url, pytest.raises(MissingFile):
        Storage(url, QUICK).size("a.tar")
    assert waits == []


def test_an_endless_answer_is_read_to_its_bound_alone():
    """A range of 100 bytes, a file of known size, a size that was promised smaller."""
    sent = [0]

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(206 if "Range" in request.headers else 200)
        request.end_headers()
        while True:
            request.wfile.write(bytes(2**16))
            sent[0] += 2**16

    with serving(answer) as url:
        storage = Storage(url, QUICK)
        with pytest.raises(DataError, match="sends the whole file instead of a range"):
            storage.read_range("a.tar", 0, 100)
        assert len(storage.read("a.npy", 100)) == 101
    assert sent[0] < 2**24  # what the sockets of this host hold


def test_a_file_of_unknown_size_has_a_bound_too(monkeypatch, tmp_path):
    """A manifest that never ends; behind a URL, on disk, as a device."""
    monkeypatch.setattr(storage_module, "_MOST_WHOLE", 1000)
    with serving(lambda request: send(request, 200, bytes(5000))) as url:
        for place, name in ((url, "manifest.json"), ("/dev", "zero"), (str(tmp_path), "manifest.json")):
            (tmp_path / "manifest.json").write_bytes(bytes(5000))
            with pytest.raises(DataError, match=f"{name} (has more than 1000 bytes|is not a file)"):
                Storage(place, QUICK).read(name)
    with pytest.raises(DataError, match="has more than 1000 bytes"):
        Storage("pipe:cat /dev/zero {name}", QUICK, allow_pipe_urls=True).read("a")


def test_a_server_without_head_is_asked_for_a_byte():
    """Some storage behind signed URLs permits GET alone."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        send(request, 405) if request.command == "HEAD" else send_file(request, CONTENT)

    with serving(answer) as url:
        assert Storage(url, QUICK).size("a.tar") == len(CONTENT)


def test_redirects_to_other_places_are_refused(waits):
    """To another host, unless that is allowed, and never to another scheme; on the same host they are followed."""
    for location, message in (
        ("http://169.254.169.254/latest/meta-data", "another host"),
        ("file:///etc/passwd", "another scheme"),
        ("ftp://127.0.0.1/x", "another scheme"),
        ("https://elsewhere.example/x", "another host"),
    ):
        with serving(functools.partial(redirect, to=location)) as url:
            for ask in (Storage(url, QUICK).size, Storage(url, QUICK).read):
                with pytest.raises(DataError, match=f"is redirected to .*{message}"):
                    ask("a.tar")
            if location.startswith("http:"):
                allowed = StorageSettings(tries=1, redirects=True)
                with pytest.raises(DataError, match="without https"):
                    Storage(url, allowed).size("a.tar")

    def answer(request: BaseHTTPRequestHandler) -> None:
        moved = request.path.startswith("/moved")
        send_file(request, CONTENT) if moved else send(request, 307, Location="/moved" + request.path)

    with serving(answer) as url:
        assert Storage(url, QUICK).read("a.tar") == CONTENT
    loop = serving(lambda request: send(request, 302, Location=request.path))
    with loop as url, pytest.raises(DataError, match="redirected more than 5 times"):
        Storage(url, QUICK).size("a.tar")
    assert waits == []


@pytest.mark.parametrize("place", ["http://", "http://me:S3CRET@"])
def test_a_redirect_elsewhere_gets_no_credentials(place, monkeypatch):
    """Of the URL and of fsspec's environment, for a session and for a request; another port is elsewhere too."""
    got: list[dict[str, str]] = []

    def target(request: BaseHTTPRequestHandler) -> None:
        got.append(dict(request.headers))
        send_file(request, CONTENT)

    headers = {"Authorization": "Bearer S3CRET", "Cookie": "id=S3CRET", "X-Token": "S3CRET"}
    if "@" in place:  # aiohttp takes a password or that header, not both
        del headers["Authorization"]
    client = {"headers": headers, "cookies": {"a": "S3CRET"}}
    monkeypatch.setitem(fsspec.config.conf, "http", {"client_kwargs": client, "headers": headers})
    first: list[dict[str, str]] = []
    with serving(target) as elsewhere:

        def answer(request: BaseHTTPRequestHandler) -> None:
            first.append(dict(request.headers))
            redirect(request, to=elsewhere + request.path)

        with serving(answer) as url:
            storage = Storage(url.replace("http://", place), QUICK)
            assert storage.read_range("a.tar", 100, 50) == CONTENT[100:150]
            assert storage.read("a.tar") == CONTENT
    assert all("S3CRET" in str(each) and "Authorization" in each for each in first)
    assert len(got) == 2
    assert "S3CRET" not in str(got)
    assert not any("Authorization" in each for each in got)


def only_for(name: str, password: str, query: str = ""):
    """A server that answers to these credentials."""
    basic = base64.b64encode(f"{name}:{password}".encode()).decode()

    def answer(request: BaseHTTPRequestHandler) -> None:
        known = request.headers.get("Authorization") == f"Basic {basic}" and request.path.endswith(query)
        send_file(request, CONTENT) if known else send(request, 401)

    return answer


def test_credentials_of_a_url_are_used_and_never_shown():
    """user:password@ and a signed query, which stays behind the file's name."""
    with serving(only_for("me", "S3CRET", "/a.tar?v=1&sig=S1GNED")) as url:
        storage = Storage(url.replace("//", "//me:S3CRET@") + "?v=1&sig=S1GNED", QUICK)
        assert storage.read("a.tar") == CONTENT
        assert storage.url == url.replace("//", "//***@") + "?v=1&sig=***"
        assert storage.place("a.tar") == url.replace("//", "//***@") + "/a.tar?v=1&sig=***"
        with pytest.raises(DataError, match="401") as caught:
            storage.inside("x").read("b.tar")
        for text in (repr(storage), str(caught.value)):
            assert "S3CRET" not in text
            assert "S1GNED" not in text


def test_a_url_that_was_written_without_them_takes_those_of_the_environment(tmp_path, monkeypatch):
    """~/.netrc, which fsspec reads when its environment says so, as docs/data.md tells."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password S3CRET\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with serving(only_for("me", "S3CRET")) as url:
        written = Storage(url.replace("//", "//me:S3CRET@"), QUICK).url
        with pytest.raises(DataError, match=r"401 .*; credentials come with the URL or from the environment"):
            Storage(written, QUICK).read("a.tar")
        monkeypatch.setitem(fsspec.config.conf, "http", {"client_kwargs": {"trust_env": True}})
        assert Storage(written, QUICK).read("a.tar") == CONTENT


def test_a_pipe_command_without_its_credentials_is_not_run(tmp_path):
    with pytest.raises(DataError, match="had credentials that are not kept in files"):
        Storage(f"pipe:touch {Path(tmp_path)}/ran https://***@host/{{name}}", QUICK, allow_pipe_urls=True)
    assert list(tmp_path.iterdir()) == []
