"""Random documents and bytes: what comes of them is a UserError or a value, in bounded time, and nothing else."""

import copy
import io
import json
import shutil
import tarfile
from contextlib import suppress
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paco_ds.config.load import load_recipe
from paco_ds.data.manifest import Manifest, load_manifest
from paco_ds.data.pack.build_plan import BuildOptions
from paco_ds.data.pack.card import card_of_options, folder_card, load_card
from paco_ds.data.pack.read import read_source
from paco_ds.data.pack.shards import build_shards
from paco_ds.data.shard import BadSample, ShardReader, index_shard, load_index
from paco_ds.errors import UserError
from paco_ds.metrics.log import read
from tests.data.tiny import TINY_CARD, encoded
from tests.hostile.corpus import manifest_of
from tests.recipes import TINY

few = settings(
    max_examples=25, deadline=20_000, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=10**15, max_value=10**40),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["", "../x", "a\0b", "\x1b[2J", "x" * 5000, "pipe:x {name}", "s3://", "[/]", "1e999", "__class__"]),
)
SOME_YAML = st.text(alphabet="[]{}&*!<>:-?|'\"#%@,a1 \n\t", max_size=80)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values of a tree but the whole."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in inner for found in ((*path, key), *places(value, (*path, key)))]


@st.composite
def changed(draw: st.DrawFn, tree: Any) -> Any:
    """The tree with one to three values replaced, removed or renamed."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from(places(tree)))
        section = tree
        for part in path:
            section = section[part]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename"]))
        if kind == "replace":
            section[last] = draw(VALUES)
        elif kind == "remove" or not isinstance(section, dict):
            del section[last]
        else:
            section[draw(st.text(max_size=8))] = section.pop(last)
        if not places(tree):
            break
    return tree


def is_user_error_or_value(read_it: Any) -> None:
    """Call it; other errors fail the test, and so does a message that is not text for a terminal."""
    try:
        read_it()
    except UserError as error:
        message = str(error)
        assert message.encode()
        assert "\x1b" not in message
        assert all(len(line) < 3000 for line in message.splitlines())


@few
@given(tree=changed(yaml.safe_load(TINY)))
def test_recipes(tree, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    is_user_error_or_value(lambda: load_recipe(path))


@few
@given(
    override=st.one_of(
        st.text(max_size=60), st.builds(lambda k, v: f"{k}={v}", st.text(max_size=12), st.text(max_size=30))
    )
)
def test_overrides(override, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "tiny.yaml"
    path.write_text(TINY)
    is_user_error_or_value(lambda: load_recipe(path, [override]))


@few
@given(raw=st.one_of(st.binary(max_size=300), SOME_YAML.map(str.encode)))
def test_bytes_as_a_recipe_or_a_card(raw, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "file.yaml"
    path.write_bytes(raw)
    is_user_error_or_value(lambda: load_recipe(path))
    is_user_error_or_value(lambda: load_card(path))


@few
@given(tree=changed(yaml.safe_load(TINY_CARD)))
def test_cards(tree, tmp_path_factory):
    """And what they list."""
    path = tmp_path_factory.mktemp("fuzz") / "card.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    is_user_error_or_value(lambda: read_source(load_card(path), path.parent))


@few
@given(tree=changed(manifest_of()))
def test_manifests(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "manifest.json").write_text(json.dumps(tree))
    is_user_error_or_value(lambda: load_manifest(folder).check_files("train"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Manifest:
    """Shards of four images, one to a shard."""
    root = tmp_path_factory.mktemp("images")
    (root / "c").mkdir()
    for number in range(4):
        (root / "c" / f"{number}.jpg").write_bytes(encoded(seed=number))
    return build_shards(folder_card(root), root, tmp_path_factory.mktemp("shards"), BuildOptions(shard_bytes=2000))


def spliced(raw: bytes, at: int, removed: int, put: bytes) -> bytes:
    at %= len(raw) + 1
    return raw[:at] + put + raw[at + removed :]


DAMAGE = st.tuples(st.integers(0, 2**20), st.integers(0, 600), st.binary(max_size=40))


@few
@given(damage=DAMAGE)
def test_indexes(damage, shards, tmp_path_factory):
    """Of the size and digest that a manifest states, so that only their content speaks against them."""
    shard = shards.split("train").shards[0]
    raw = spliced((shards.directory / shard.index_file).read_bytes(), *damage)
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / shard.index_file).write_bytes(raw)
    stated = shard.model_copy(update={"index_bytes": max(len(raw), 1), "index_sha256": sha256(raw).hexdigest()})
    is_user_error_or_value(lambda: load_index(folder, stated))


@few
@given(damage=DAMAGE)
def test_tars(damage, shards, tmp_path_factory):
    """As shards that are indexed again, and as a source of another build."""
    shard = shards.split("train").shards[0]
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "train-0.tar").write_bytes(spliced((shards.directory / shard.file).read_bytes(), *damage))
    is_user_error_or_value(lambda: index_shard(folder / "train-0.tar"))
    options = {"source": "webdataset", "root": str(folder), "train": "train-*.tar"}
    is_user_error_or_value(lambda: read_source(card_of_options(options), folder))


@few
@given(
    name=st.text(max_size=30),
    about=st.one_of(VALUES.map(json.dumps), st.text(max_size=30)),
    kind=st.sampled_from(b"0125"),
)
def test_members_of_tars(name, about, kind, tmp_path_factory):
    """Any name, kind and JSON."""
    folder = tmp_path_factory.mktemp("fuzz")
    with tarfile.open(folder / "train-0.tar", "w", errors="surrogatepass") as tar:
        for ending, data in ((".jpg", b"x"), (".json", about.encode(errors="replace"))):
            info = tarfile.TarInfo(name.replace("\0", "") + ending)
            info.size = len(data) if kind == 48 else 0
            info.type, info.linkname = bytes([kind]), "/etc/passwd"
            tar.addfile(info, io.BytesIO(data))
    options = {"source": "webdataset", "root": str(folder), "train": "train-*.tar"}
    is_user_error_or_value(lambda: read_source(card_of_options(options), folder))


@few
@given(damage=DAMAGE)
def test_samples_of_a_damaged_shard(damage, shards, tmp_path_factory):
    """A bad sample, or an error that names the file."""
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(shards.directory, folder, dirs_exist_ok=True)
    path = folder / shards.split("train").shards[0].file
    raw = path.read_bytes()
    path.write_bytes(spliced(raw, *damage)[: len(raw)].ljust(len(raw), b"\0"))

    def read_all() -> None:
        with ShardReader(folder, shards.split("train")) as reader:
            for number in range(4):
                with suppress(BadSample):
                    assert isinstance(reader.read(number).image, bytes)

    is_user_error_or_value(read_all)


@few
@given(
    lines=st.lists(
        st.one_of(st.binary(max_size=50), VALUES.map(lambda v: json.dumps({"kind": "step", "step": v}).encode())),
        max_size=6,
    )
)
def test_logs(lines, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "metrics.jsonl"
    path.write_bytes(b"\n".join(lines))
    assert all(isinstance(line["step"], int) for line in read(path))


def test_numpy_still_reads_our_indexes(shards):
    """What is checked in an index's header is what numpy writes."""
    found = load_index(shards.directory, shards.split("train").shards[0])
    assert np.array_equal(found, np.load(shards.directory / shards.split("train").shards[0].index_file))
