"""Storage: local, in memory, and a real S3-compatible server that fails, stalls and cuts connections."""

import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pytest

from paco_ds.command import exit_status
from paco_ds.config.data import StorageSettings
from paco_ds.config.load import load_recipe
from paco_ds.data import storage as storage_module
from paco_ds.data.cache import FileCache
from paco_ds.data.manifest import Manifest, load_manifest, open_data
from paco_ds.data.shard import BadSample, ShardReader, check_shard
from paco_ds.data.storage import MissingFile, Storage
from paco_ds.distributed.ranks import MicroBatchLayout
from paco_ds.errors import RESUMABLE, DataError
from paco_ds.training.build import build_stream
from tests.data.s3 import BUCKET, Proxy
from tests.data.tiny import same_views
from tests.recipes import tiny_recipe, write_tiny_recipe

QUICK = StorageSettings(tries=3, timeout=60.0)  # a busy machine may be slow, and a server that stalls is not among them


@pytest.fixture(params=["local", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage of each kind."""
    if request.param == "s3":
        request.getfixturevalue("s3")
    url = {"local": str(tmp_path), "memory": f"memory://{tmp_path}", "s3": f"s3://{BUCKET}{tmp_path}"}[request.param]
    return Storage(url, QUICK)


def _file_system(storage: Storage) -> Any:
    remote: Any = storage._connected()
    return remote.fs


def upload(source: Path, target: Storage) -> Storage:
    """All files of a local directory."""
    for path in source.iterdir():
        with target.write(path.name) as file:
            file.write(path.read_bytes())
    return target


@pytest.fixture
def in_memory(tiny_shards: Manifest, tmp_path: Path) -> Storage:
    """The tiny shards in memory."""
    return upload(tiny_shards.directory, Storage(f"memory://{tmp_path}", QUICK))


def test_what_is_written_is_read_whole_and_by_ranges(storage: Storage) -> None:
    """Bytes, ranges, sizes and listing agree for every kind of storage."""
    content = bytes(range(256)) * 40
    with storage.write("a.bin") as file:
        file.write(content)
    assert storage.read("a.bin") == content
    assert storage.read_range("a.bin", 100, 300) == content[100:400]
    assert storage.read_range("a.bin", 5, 0) == b""
    assert storage.size("a.bin") == len(content)
    assert storage.sizes() == {"a.bin": len(content)}
    assert storage.exists("a.bin")
    assert not storage.exists("b.bin")


def test_a_missing_file_is_told_at_once(storage: Storage) -> None:
    """No tries are spent on what is not there; the message names it."""
    for request in (storage.read, storage.size, lambda name: storage.read_range(name, 0, 3)):
        with pytest.raises(MissingFile, match=r"nothing\.bin.* is missing"):
            request("nothing.bin")


def test_a_write_that_fails_leaves_nothing(storage: Storage) -> None:
    """Neither a part of the new file nor a loss of the old one."""
    with storage.write("a.bin") as file:
        file.write(b"old")

    def write_half() -> None:
        with storage.write("a.bin") as file:
            file.write(b"new, and then")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_half()
    assert storage.read("a.bin") == b"old"
    assert storage.sizes() == {"a.bin": 3}


def test_a_storage_in_use_can_be_sent_to_a_process(storage: Storage) -> None:
    """The copy opens connections of its own."""
    with storage.write("a.bin") as file:
        file.write(b"abc")
    copy = pickle.loads(pickle.dumps(storage))
    assert copy._remote is None
    assert copy.read("a.bin") == b"abc"
    assert copy.settings == QUICK


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("pipe:cat /etc/passwd", r"would run a command.*data.allow_pipe_urls"),
        ("PIPE:cat x", r"would run a command"),
        ("cmd:cat x", r"would run a command"),
        ("reference://x.json", r"would run a command"),
        ("simplecache::s3://bucket/x", r"chains file systems"),
        ("s4://bucket/x", r"fsspec does not support 's4'; it supports .*s3"),
    ],
)
def test_urls_that_execute_or_that_nobody_knows_are_refused(url: str, message: str) -> None:
    """Before anything is opened; also where the recipe names them."""
    with pytest.raises(DataError, match=message):
        Storage(url)
    with pytest.raises(DataError, match=message):
        open_data(tiny_recipe(f"data.shards='{url}'").data, ["train"])


def test_urls_of_a_recipe_stay_and_its_paths_are_relative_to_it(tmp_path: Path) -> None:
    """Of shards and of the cache, in the file and in overrides."""
    cache = "data.cache={directory: cache, bytes: 10}"
    recipe = write_tiny_recipe(tmp_path / "r.yaml", "data.shards=s3://bucket/x", cache)
    assert recipe.data.shards == "s3://bucket/x"
    assert recipe.data.cache.directory == str(tmp_path / "cache")
    assert write_tiny_recipe(tmp_path / "r.yaml", "data.shards='pipe:cat {name}'").data.shards == "pipe:cat {name}"
    changed = load_recipe(tmp_path / "r.yaml", ["data.shards=near", "data.cache={directory: /c, bytes: 10}"])
    assert changed.data.shards == str(Path.cwd() / "near")
    assert changed.data.cache.directory == "/c"


def test_a_pipe_command_runs_only_where_it_is_allowed(tiny_shards: Manifest, tmp_path: Path) -> None:
    """It gives whole files, so shards need the cache; no shell reads it."""
    url = f"pipe:cat {tiny_shards.directory}/{{name}}"
    without = Storage(url, QUICK, allow_pipe_urls=True)
    manifest = load_manifest(without)
    assert manifest.sha256 == tiny_shards.sha256
    with pytest.raises(DataError, match=r"whole files, not ranges.*data.cache"):
        ShardReader(without, manifest.split("train")).read(0)
    cached = Storage(url, QUICK, cache=FileCache(tmp_path / "cache", 10**6), allow_pipe_urls=True)
    expected = ShardReader(tiny_shards.directory, manifest.split("train"))
    assert ShardReader(cached, manifest.split("train")).read(40) == expected.read(40)
    with pytest.raises(DataError, match=r"the command ended with 1: .*No such file"):
        without.read("nothing.bin")
    with pytest.raises(DataError, match=r"lacks \{name\}"):
        Storage("pipe:cat x", allow_pipe_urls=True)
    with pytest.raises(DataError, match="3 tries"):
        Storage(f"pipe:cat {{name}}; touch {tmp_path}/ran", QUICK, allow_pipe_urls=True).read("a")
    assert not (tmp_path / "ran").exists()


def test_a_pipe_command_that_is_mistyped_is_named() -> None:
    """Not as a missing manifest, nor as an outage."""
    with pytest.raises(DataError, match=r"there is no command 'nosuchcommand' to run"):
        load_manifest(Storage("pipe:nosuchcommand {name}", QUICK, allow_pipe_urls=True))
    with pytest.raises(DataError, match=r"pipe:cat 'x {name} cannot be split into words: No closing quotation"):
        Storage("pipe:cat 'x {name}", QUICK, allow_pipe_urls=True)


def test_a_request_is_tried_again_with_longer_waits(in_memory: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits double and vary; the last failure is told with what was tried."""
    waits: list[float] = []
    monkeypatch.setattr(storage_module.time, "sleep", waits.append)
    monkeypatch.setattr(storage_module, "_FIRST_WAIT", 0.5)
    patient = Storage(in_memory.url, StorageSettings(tries=9, timeout=60))
    fails = [8]

    def cat_file(*args: object, **kwargs: object) -> bytes:
        fails[0] -= 1
        if fails[0] >= 0:
            raise ConnectionResetError("reset by peer")
        return b"good"

    monkeypatch.setattr(_file_system(patient), "cat_file", cat_file)
    assert patient.read("manifest.json") == b"good"
    bounds = [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert all(bound / 2 <= wait <= bound for wait, bound in zip(waits, bounds, strict=True))
    assert len({wait / bound for wait, bound in zip(waits, bounds, strict=True)}) > 1
    fails[0] = 100
    with pytest.raises(DataError, match=r"memory://.*manifest.json: 9 tries .*reset by peer.*data.storage.tries"):
        patient.read("manifest.json")


@pytest.mark.parametrize("name", ["PermissionError", "NoCredentialsError"])
def test_refused_or_missing_keys_are_told_at_once(
    in_memory: Storage, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Minutes of tries would not find them."""
    error = PermissionError if name == "PermissionError" else type(name, (Exception,), {})
    calls: list[object] = []

    def cat_file(*args: object, **kwargs: object) -> bytes:
        calls.append(args)
        raise error("Unable to locate credentials")

    monkeypatch.setattr(_file_system(in_memory), "cat_file", cat_file)
    with pytest.raises(DataError, match=rf"manifest.json: {name}: Unable to locate credentials") as caught:
        in_memory.read("manifest.json")
    assert len(calls) == 1
    assert exit_status(caught.value) == 2


def test_after_an_outage_a_job_is_started_again(in_memory: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its exit status, which no mistake in the data has."""

    def cat_file(*args: object, **kwargs: object) -> bytes:
        raise ConnectionRefusedError("no route")

    monkeypatch.setattr(_file_system(in_memory), "cat_file", cat_file)
    with pytest.raises(DataError, match=r"3 tries .*no route") as caught:
        in_memory.read("manifest.json")
    assert exit_status(caught.value) == RESUMABLE


def test_a_file_system_that_never_answers_is_given_up(in_memory: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one without time limits of its own."""
    hasty = Storage(in_memory.url, StorageSettings(tries=2, timeout=0.05))
    answer = threading.Event()
    monkeypatch.setattr(_file_system(hasty), "cat_file", lambda *a, **k: answer.wait())
    try:
        with pytest.raises(DataError, match=r"2 tries .*TimeoutError"):
            hasty.read("manifest.json")
    finally:
        answer.set()


def test_a_server_without_ranges_is_told(in_memory: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would send the whole shard for every window."""
    monkeypatch.setattr(_file_system(in_memory), "cat_file", lambda *a, **k: b"x" * 5000)
    with pytest.raises(DataError, match="sends the whole file instead of a range"):
        in_memory.read_range("train-00000.tar", 0, 512)


def test_shards_are_read_from_memory_as_from_disk(in_memory: Storage, tiny_shards: Manifest) -> None:
    """Manifest, check of the files, samples and check of the shards."""
    manifest = load_manifest(in_memory)
    assert manifest.sha256 == tiny_shards.sha256
    manifest.check_files("train")
    split = manifest.split("train")
    here, there = ShardReader(tiny_shards.directory, split), ShardReader(manifest.storage, split)
    assert [there.read(i) for i in range(47)] == [here.read(i) for i in range(47)]
    assert check_shard(manifest.storage, split, 0) == []
    with pytest.raises(DataError, match="is remote"):
        _ = manifest.directory


def test_remote_shards_that_are_cut_or_missing_are_found_by_one_listing(
    in_memory: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again when they are opened."""
    manifest = load_manifest(in_memory)
    raw = in_memory.read("train-00001.tar")
    with in_memory.write("train-00001.tar") as file:
        file.write(raw[:-1024])
    with pytest.raises(DataError, match=r"memory://.*train-00001.tar has \d+ bytes, manifest.json says"):
        manifest.check_files("train")
    first = manifest.split("train").shards[0].samples
    with pytest.raises(DataError, match=r"train-00001.tar has \d+ bytes, manifest.json says"):
        ShardReader(manifest.storage, manifest.split("train")).read(first)
    fs = fsspec.filesystem("memory")
    fs.rm_file(manifest.storage.place("train-00001.tar"))
    with pytest.raises(DataError, match=r"train-00001.tar is missing, but manifest.json lists it"):
        manifest.check_files("train")
    with pytest.raises(DataError, match=r"train-00001.tar is missing, but manifest.json lists it"):
        ShardReader(manifest.storage, manifest.split("train")).read(first)


def test_a_flipped_byte_behind_a_url_is_one_bad_sample(in_memory: Storage) -> None:
    """CRCs are kept for remote ranges."""
    raw = bytearray(in_memory.read("train-00000.tar"))
    raw[700] ^= 1
    with in_memory.write("train-00000.tar") as file:
        file.write(raw)
    reader = ShardReader(in_memory, load_manifest(in_memory).split("train"))
    with pytest.raises(BadSample, match=r"train-00000000 .*crc_mismatch"):
        reader.read(0)
    assert reader.read(1).key == "train-00000001"


def test_s3_shards_are_read_though_connections_fail_stall_and_are_cut(
    s3: Proxy, tiny_shards: Manifest, tmp_path: Path
) -> None:
    """Every sample comes, and is the right one."""
    upload(tiny_shards.directory, Storage(f"s3://{BUCKET}/shaky", QUICK))
    expected = [ShardReader(tiny_shards.directory, tiny_shards.split("train")).read(i) for i in (0, 20, 46)]
    for kind, connections, cut_after in (("refuse", 3, 0), ("stall", 1, 0), ("cut", 3, 900)):
        patient = Storage(f"s3://{BUCKET}/shaky", StorageSettings(tries=9, timeout=5))
        s3.make(kind, connections, cut_after)
        manifest = load_manifest(patient)
        manifest.check_files("train")
        reader = ShardReader(manifest.storage, manifest.split("train"))
        assert [reader.read(i) for i in (0, 20, 46)] == expected, kind
        assert s3.trouble == 0, kind


def test_loader_processes_read_from_s3_with_the_ranks_keys(s3: Proxy, tiny_shards: Manifest) -> None:
    """Though the server that they are forked from may have been started before the keys were set."""
    upload(tiny_shards.directory, Storage(f"s3://{BUCKET}/loaders", QUICK))
    common = ("step.micro_batch=2", "step.micro_batches=4", "data.window=8", "schedule.epochs=1")
    layout = MicroBatchLayout(2, 4, 0, 1)
    local = [batch for step in build_stream(tiny_recipe(*common), tiny_shards, layout) for batch in step]
    recipe = tiny_recipe(*common, f"data.shards=s3://{BUCKET}/loaders", "data.workers=2", "data.storage={tries: 3}")
    stream = build_stream(recipe, open_data(recipe.data, ["train"]), layout)
    found = [batch for step in stream for batch in step]
    stream.close()
    assert all(same_views(a, b) for a, b in zip(local, found, strict=True))


def test_an_s3_that_stays_away_ends_with_its_url_and_what_was_tried(s3: Proxy) -> None:
    """No hang."""
    s3.make("stall", 1000)
    try:
        with pytest.raises(DataError, match=rf"s3://{BUCKET}/far/manifest.json: 2 tries in \d+ s, the last: .*Timeout"):
            load_manifest(Storage(f"s3://{BUCKET}/far", StorageSettings(tries=2, timeout=0.5)))
    finally:
        s3.make("", 0)


def test_the_cache_reads_a_shard_once(in_memory: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every later read is local, of this process or another."""
    cached = Storage(in_memory.url, QUICK, cache=FileCache(tmp_path / "cache", 10**6))
    split = load_manifest(cached).split("train")
    expected = [ShardReader(in_memory, split).read(i) for i in range(47)]
    assert [ShardReader(cached, split).read(i) for i in range(47)] == expected
    monkeypatch.setattr(Storage, "read_range", lambda *a: pytest.fail("read again"))
    assert [ShardReader(cached, split).read(i) for i in range(47)] == expected


def test_another_version_of_a_file_is_another_copy(in_memory: Storage, tmp_path: Path) -> None:
    """A shard that was replaced is not served from the cache."""
    cached = Storage(in_memory.url, QUICK, cache=FileCache(tmp_path / "cache", 10**6))
    for content in (b"first", b"other"):
        with in_memory.write("x") as file:
            file.write(content)
        with cached.open_whole("x", 5) as file:
            assert file.read() == content


def _write(content: bytes) -> Callable[[BinaryIO], None]:
    def fetch(file: BinaryIO) -> None:
        file.write(content)

    return fetch


def test_the_cache_keeps_within_its_bytes_and_drops_what_was_used_least_recently(tmp_path: Path) -> None:
    """A copy in use stays readable when it is dropped."""
    cache = FileCache(tmp_path, 250)
    fetched = []

    def get(name: str) -> bytes:
        def fetch(file: BinaryIO) -> None:
            fetched.append(name)
            file.write(name.encode() * 100)

        with cache.open(name, 100, fetch) as file:
            return file.read()

    held = cache.open("a", 100, _write(b"a" * 100))
    for name in "bab":
        time.sleep(0.01)
        get(name)
    time.sleep(0.01)
    get("c")  # drops a
    assert fetched == ["b", "c"]
    assert sum(p.stat().st_size for p in tmp_path.glob("*.copy")) <= 250
    assert get("b") == b"b" * 100
    assert fetched == ["b", "c"]
    assert held.read() == b"a" * 100
    get("a")
    assert fetched == ["b", "c", "a"]
    with pytest.raises(DataError, match=r"file of 300 bytes does not fit data.cache.bytes = 250"):
        cache.open("d", 300, lambda file: None)


def test_a_fetch_that_fails_leaves_no_copy(tmp_path: Path) -> None:
    """The next one begins anew."""
    cache = FileCache(tmp_path, 250)

    def fails(file: BinaryIO) -> None:
        file.write(b"half")
        raise DataError("cut")

    with pytest.raises(DataError, match="cut"):
        cache.open("a", 100, fails)
    assert not [p for p in tmp_path.iterdir() if p.suffix in (".copy", ".unfinished")]
    with cache.open("a", 4, _write(b"full")) as file:
        assert file.read() == b"full"


def _killed_while_it_fetches(directory: Path, name: str) -> None:
    FileCache(directory, 400).open(name, 100, lambda file: os.kill(os.getpid(), signal.SIGKILL))


def test_what_killed_processes_left_unfinished_takes_no_room(tmp_path: Path) -> None:
    """The next start fetches at once, into a cache that is full of it; what another process writes stays."""
    context = multiprocessing.get_context("fork")
    for name in "abcd":
        killed = context.Process(target=_killed_while_it_fetches, args=(tmp_path, name))
        killed.start()
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
    cache = FileCache(tmp_path, 200)

    def fetch(file: BinaryIO) -> None:
        with pytest.raises(DataError, match="has 100 bytes of unfinished files and cannot take 150 more"):
            cache.open("e", 150, _write(b"e" * 150))
        cache.open("b", 100, _write(b"b" * 100)).close()
        file.write(b"a" * 100)

    with cache.open("a", 100, fetch) as file:
        assert file.read() == b"a" * 100
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 200


def test_a_cache_directory_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data.cache.directory .*/file cannot be used"):
        FileCache(tmp_path / "file", 100).open("a", 10, _write(b"a" * 10))


def _read_through(directory: Path, limit: int, log: Path, order: int) -> None:
    cache = FileCache(directory, limit)
    for turn in range(30):
        name = (turn * (2 * order + 1)) % 6

        def fetch(file: BinaryIO, name: int = name) -> None:
            with log.open("a") as lines:
                lines.write(f"{name}\n")
            for _ in range(10):
                file.write(bytes([name]) * 100)

        with cache.open(f"file {name}", 1000, fetch) as file:
            assert file.read() == bytes([name]) * 1000


def test_many_processes_share_a_cache(tmp_path: Path) -> None:
    """No process sees another's half copy; where all fits, each file is fetched once."""
    context = multiprocessing.get_context("fork")
    for limit in (6000, 4500):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        log = tmp_path / f"log{limit}"
        workers = [context.Process(target=_read_through, args=(tmp_path / "cache", limit, log, n)) for n in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert [worker.exitcode for worker in workers] == [0] * 4
        assert sum(p.stat().st_size for p in (tmp_path / "cache").glob("*.copy")) <= limit
        if limit == 6000:
            assert sorted(log.read_text().split()) == list("012345")
