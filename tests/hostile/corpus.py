"""Attacks by files and names from outside: each harms a naive reader, and is one clear line to ours.

`naive(folder)` writes the attack's files, lets a naive reader have them and returns whether it was harmed, without harm
to this host: what would run a command makes a folder, what would never end is cut short.
"""

from __future__ import annotations

import importlib
import io
import json
import operator
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from paco_ds.config.load import load_recipe
from paco_ds.config.plugins import load_plugin
from paco_ds.data.manifest import load_manifest
from paco_ds.data.pack.card import card_of_options, load_card
from paco_ds.data.pack.read import read_source
from paco_ds.data.shard import INDEX_DTYPE, load_index
from paco_ds.data.storage import Storage
from paco_ds.distributed.hostfile import read_hostfile
from paco_ds.paper.reproduce import Job, write_commands
from paco_ds.paper.tables import load_table
from paco_ds.report.run_report import write_report
from paco_ds.training.engine import read_deepspeed_config
from paco_ds.training.initial_weights import _of_file
from tests.recipes import TINY

FLAG = "harmed"  # a folder that only executed code makes


@dataclass(frozen=True)
class Attack:
    """One attack.

    Attributes:
        naive: whether a naive reader is harmed by the files it writes.
        ours: what our reader does with them; raises a UserError, unless `taken`.
        said: in the error's message.
        taken: the input is harmless to ours and accepted.
    """

    name: str
    naive: Callable[[Path], bool]
    ours: Callable[[Path], Any]
    said: str = ""
    taken: bool = False


class Makes:
    """Pickles to a call that makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.flag = str(folder / FLAG)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.flag,)


def raises(error: type[BaseException], function: Callable[[], Any]) -> bool:
    """Whether the call ends so; what a program that does not expect it dies of."""
    try:
        function()
    except error:
        return True
    return False


def write(path: Path, content: str | bytes) -> Path:
    """Write a file and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def recipe(folder: Path, text: str | bytes) -> Path:
    return write(folder / "recipe.yaml", text)


def expanded(value: Any, most: int = 10**6) -> bool:
    """Whether a walk over the values, as any printing or validation is, meets more than `most`."""
    waiting, seen = [value], 0
    while waiting and seen <= most:
        node = waiting.pop()
        seen += 1
        waiting += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return seen > most


LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
DEEP_JSON = "[" * 100_000


def tag(folder: Path) -> str:
    """YAML whose value is a call."""
    return f"!!python/object/apply:os.mkdir ['{folder / FLAG}']"


def runs_yaml(folder: Path, text: str) -> bool:
    yaml.unsafe_load(text)
    return (folder / FLAG).is_dir()


def set_value(folder: Path, override: str) -> Any:
    """A recipe with one --set."""
    return load_recipe(recipe(folder, "name: x\n"), [override])


YAML_ATTACKS = [
    Attack(
        "a tag in a recipe",
        lambda d: runs_yaml(d, recipe(d, f"name: {tag(d)}\n").read_text()),
        lambda d: load_recipe(recipe(d, f"name: {tag(d)}\n")),
        "recipe.yaml is not valid YAML",
    ),
    Attack(
        "a tag in a card",
        lambda d: runs_yaml(d, write(d / "card.yaml", f"name: {tag(d)}\n").read_text()),
        lambda d: load_card(write(d / "card.yaml", f"name: {tag(d)}\n")),
        "card .*card.yaml is not valid YAML",
    ),
    Attack(
        "a tag in a table",
        lambda d: runs_yaml(d, write(d / "table.yaml", f"title: {tag(d)}\n").read_text()),
        lambda d: load_table(write(d / "table.yaml", f"title: {tag(d)}\n")),
        "table.yaml is not valid YAML",
    ),
    Attack(
        "a tag in --set",
        lambda d: runs_yaml(d, tag(d)),
        lambda d: set_value(d, f"name={tag(d)}"),
        "--set name=.*is not valid YAML",
    ),
    Attack(
        "an object's tag",
        lambda d: isinstance(yaml.unsafe_load("!!python/object:tests.hostile.corpus.Makes {flag: x}"), Makes),
        lambda d: load_recipe(recipe(d, "!!python/object:tests.hostile.corpus.Makes {flag: x}")),
        "is not valid YAML",
    ),
    Attack(
        "a module's tag",
        lambda d: yaml.unsafe_load("!!python/name:os.system") is os.system,
        lambda d: load_recipe(recipe(d, "name: !!python/name:os.system")),
        "is not valid YAML",
    ),
    Attack(
        "a billion laughs in a recipe",
        lambda d: expanded(yaml.safe_load(LAUGHS)),
        lambda d: load_recipe(recipe(d, LAUGHS)),
        "more than 200000 values",
    ),
    Attack(
        "a billion laughs in a card",
        lambda d: expanded(yaml.safe_load(LAUGHS)),
        lambda d: load_card(write(d / "card.yaml", LAUGHS)),
        "more than 200000 values",
    ),
    Attack(
        "a billion laughs in --set",
        lambda d: expanded(yaml.safe_load(LAUGHS)),
        lambda d: set_value(d, f"name={LAUGHS}"),
        "more than 200000 values",
    ),
    Attack(
        "a list in itself",
        lambda d: expanded(yaml.safe_load("&a [*a, *a]")),
        lambda d: load_recipe(recipe(d, "name: &a [*a, *a]")),
        "nested more than",
    ),
    Attack(
        "a deep recipe",
        lambda d: raises(RecursionError, lambda: yaml.safe_load("[" * 500)),
        lambda d: load_recipe(recipe(d, "[" * 10_000)),
        "nested more than",
    ),
    Attack(
        "a long number",
        lambda d: raises(ValueError, lambda: repr(yaml.safe_load("0x" + "f" * 10_000))),
        lambda d: load_recipe(recipe(d, "seed: 0x" + "f" * 10_000)),
        "a number has more than 100 characters",
    ),
    Attack(
        "a date that is none",
        lambda d: raises(ValueError, lambda: yaml.safe_load("2001-99-99")),
        lambda d: load_recipe(recipe(d, "name: 2001-99-99")),
        "is not valid YAML: month",
    ),
    Attack(
        "a key given twice",
        lambda d: yaml.safe_load("license: MIT\nlicense: none") == {"license": "none"},
        lambda d: load_card(write(d / "card.yaml", "license: MIT\nlicense: none")),
        "key 'license' is given twice",
    ),
    Attack(
        "a recipe of another encoding",
        lambda d: raises(UnicodeDecodeError, lambda: recipe(d, b"name: caf\xe9").read_text("utf-8")),
        lambda d: load_recipe(recipe(d, b"name: caf\xe9")),
        "recipe.yaml is not valid YAML: 'utf-8' codec",
    ),
    Attack(
        "an endless recipe",
        lambda d: len(os.pread(os.open("/dev/zero", os.O_RDONLY), 2**22, 0)) == 2**22,
        lambda d: load_recipe("/dev/zero"),
        "/dev/zero has more than 2097152 bytes",
    ),
    Attack(
        "a recipe of 50,000 mistakes",
        lambda d: len(yaml.safe_load("".join(f"k{i}: 1\n" for i in range(300)))) == 300,
        lambda d: load_recipe(recipe(d, "".join(f"k{i}: 1\n" for i in range(300)))),
        "and 28[0-9] more mistakes",
    ),
    Attack(
        "a base of a name without end",
        lambda d: raises(OSError, lambda: Path("x" * 5000).exists()),
        lambda d: load_recipe(recipe(d, f"base: {'x' * 5000}")),
        "no recipe x",
    ),
    Attack(
        "a path with a zero byte",
        lambda d: raises(ValueError, lambda: Path("a\0b").resolve()),
        lambda d: load_recipe(recipe(d, 'data: {shards: "a\\0b"}')),
        "is no path",
    ),
]


def manifest_of(index: bytes = b"", samples: int = 1, **shard: Any) -> dict[str, Any]:
    """The content of a manifest of one shard with this index."""
    about = {
        "name": "train-00000",
        "samples": samples,
        "bytes": 10240,
        "sha256": "0" * 64,
        "index_bytes": max(len(index), 1),
        "index_sha256": sha256(index).hexdigest(),
    } | shard
    split = {
        "name": "train",
        "samples": about["samples"],
        "class_counts": [about["samples"]],
        "bytes": about["bytes"],
        "shards": [about],
    }
    return {
        "format": "paco_ds shards",
        "version": 1,
        "name": "x",
        "license": "",
        "source": "",
        "seed": 0,
        "classes": ["a"],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "shots": {},
        "splits": {"train": split},
    }


def manifest(folder: Path, raw: str | None = None, index: bytes = b"", **about: Any) -> Path:
    """A folder with a manifest of one shard, and its index."""
    write(folder / "manifest.json", json.dumps(manifest_of(index, **about)) if raw is None else raw)
    write(folder / "train-00000.index.npy", index)
    return folder


def read_index(folder: Path) -> Any:
    """The index of the only shard."""
    found = load_manifest(folder)
    return load_index(found.storage, found.split("train").shards[0])


def npy(array: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


def pickled_index(folder: Path) -> bytes:
    return npy(np.array([Makes(folder)], object))


def promised_index() -> bytes:
    """An index whose header asks for a petabyte."""
    return npy(np.zeros(1, INDEX_DTYPE)).replace(b"(1,), }" + b" " * 12, b"(%d,), }" % 2**45)[:400]


def report(folder: Path, **files: str | bytes) -> Any:
    """The page of a run with these files."""
    write(folder / "metrics.jsonl", files.pop("log", ""))
    for name, content in files.items():
        write(folder / name.replace("__", "."), content)
    return write_report(folder)


JSON_ATTACKS = [
    Attack(
        "a deep manifest",
        lambda d: raises(RecursionError, lambda: json.loads(DEEP_JSON)),
        lambda d: load_manifest(manifest(d, DEEP_JSON)),
        "manifest.json is not JSON .it is nested too deep.; rebuild it",
    ),
    Attack(
        "a deep DeepSpeed configuration",
        lambda d: raises(RecursionError, lambda: json.loads(DEEP_JSON)),
        lambda d: read_deepspeed_config(write(d / "zero.json", DEEP_JSON)),
        "zero.json is not JSON",
    ),
    Attack(
        "a DeepSpeed configuration that is a list",
        lambda d: raises(AttributeError, lambda: json.loads("[1]").get("x")),
        lambda d: read_deepspeed_config(write(d / "zero.json", "[1]")),
        "is not a DeepSpeed configuration",
    ),
    Attack(
        "deep results of a run",
        lambda d: raises(RecursionError, lambda: json.loads(DEEP_JSON)),
        lambda d: report(d, metrics__json=DEEP_JSON),
        "metrics.json is not JSON",
    ),
    Attack(
        "results of wrong types",
        lambda d: raises(TypeError, lambda: sorted(json.loads("[1, null]"))),
        lambda d: report(
            d, metrics__json='{"class_names": 3, "class_counts": 1, "shots_of_classes": [], "per_class": 0}'
        ),
        "is not as a run writes it",
    ),
    Attack(
        "a log of zeros, garbage and depth",
        lambda d: raises(RecursionError, lambda: [json.loads(line) for line in [DEEP_JSON]]),
        lambda d: report(d, log=b"\0" * 5000 + b"\n" + DEEP_JSON.encode() + b"\n{]\n"),
        taken=True,
    ),
    Attack(
        "a size beyond an int64",
        lambda d: raises(OverflowError, lambda: np.array([10**30], np.int64)),
        lambda d: load_manifest(manifest(d, samples=10**30)),
        "less than 281474976710656",
    ),
    Attack(
        "a shard's name that climbs",
        lambda d: not (d / f"{'../../etc/passwd'}.tar").resolve().is_relative_to(d.resolve()),
        lambda d: load_manifest(manifest(d, name="../../etc/passwd")),
        "name: String should match",
    ),
    Attack(
        "a shard's name that is a URL",
        lambda d: "://" in f"{'http://169.254.169.254/x'}.tar",
        lambda d: load_manifest(manifest(d, name="http://169.254.169.254/x")),
        "name: String should match",
    ),
    Attack(
        "a shard's name that is a command",
        lambda d: subprocess.run(f": pipe; mkdir {d}/{FLAG}", shell=True).returncode == 0,
        lambda d: load_manifest(manifest(d, name=f"pipe:mkdir {d}/{FLAG}")),
        "name: String should match",
    ),
    Attack(
        "a mean that is no number",
        lambda d: bool(np.isnan(json.loads("NaN"))),
        lambda d: load_manifest(manifest(d, json.dumps(manifest_of() | {"mean": [float("nan"), 0.5, 0.5]}))),
        "mean",
    ),
    Attack(
        "an index that is a pickle",
        lambda d: bool(np.load(io.BytesIO(pickled_index(d)), allow_pickle=True).shape) and (d / FLAG).is_dir(),
        lambda d: read_index(manifest(d, index=pickled_index(d))),
        "is not an index",
    ),
    Attack(
        "an index that asks for a petabyte",
        lambda d: raises(MemoryError, lambda: np.load(io.BytesIO(promised_index()))),
        lambda d: read_index(manifest(d, index=promised_index())),
        "is not an index of 1 samples",
    ),
    Attack(
        "an index of fewer bytes than samples",
        lambda d: raises(ValueError, lambda: np.load(io.BytesIO(npy(np.zeros(9, INDEX_DTYPE))[:200]))),
        lambda d: read_index(manifest(d, index=npy(np.zeros(9, INDEX_DTYPE))[:200], samples=9)),
        "is not an index of 9 samples",
    ),
]


def cifar(folder: Path, batch: Any) -> Path:
    """CIFAR-100 as unpacked, whose training batch is this."""
    write(folder / "meta", pickle.dumps({b"fine_label_names": [b"a"]}))
    for name in ("train", "test"):
        write(folder / name, pickle.dumps(batch))
    return folder


def listed(folder: Path, source: str, **options: str) -> Any:
    """The images that a source lists, none of which is opened."""
    options = {"source": source, "root": str(folder), **options}
    return read_source(card_of_options(options), folder)


def executes(folder: Path, load: Callable[[], Any]) -> bool:
    load()
    return (folder / FLAG).is_dir()


def weights(folder: Path, value: Any, **options: Any) -> Path:
    torch.save(value, folder / "weights.pth", **options)
    return folder / "weights.pth"


def global_call(module: bytes, name: bytes) -> bytes:
    """A pickle that looks up a function, as an attack on an allow list does."""
    return b"\x80\x04\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(name)]) + name + b"\x93."


PICKLE_ATTACKS = [
    Attack(
        "a CIFAR batch that executes",
        lambda d: executes(d, lambda: pickle.loads((cifar(d, Makes(d)) / "train").read_bytes())),
        lambda d: listed(cifar(d, Makes(d)), "cifar"),
        "is no CIFAR pickle: it asks for posix.mkdir",
    ),
    Attack(
        "CIFAR class names that execute",
        lambda d: executes(d, lambda: pickle.loads(pickle.dumps({b"fine_label_names": Makes(d)}))),
        lambda d: listed(write(cifar(d, {}) / "meta", pickle.dumps({b"fine_label_names": Makes(d)})).parent, "cifar"),
        "meta is no CIFAR pickle: it asks for posix.mkdir",
    ),
    Attack(
        "a CIFAR batch that looks up eval",
        lambda d: pickle.loads(global_call(b"builtins", b"eval")) is eval,
        lambda d: listed(write(cifar(d, {}) / "train", global_call(b"builtins", b"eval")).parent, "cifar"),
        "it asks for builtins.eval",
    ),
    Attack(
        "a CIFAR batch that asks for a petabyte",
        lambda d: raises(MemoryError, lambda: pickle.loads(huge_array())),
        lambda d: listed(write(cifar(d, {}) / "train", huge_array()).parent, "cifar"),
        "is no CIFAR pickle",
    ),
    Attack(
        "weights that execute",
        lambda d: executes(d, lambda: torch.load(weights(d, Makes(d)), weights_only=False)),
        lambda d: _of_file(weights(d, Makes(d))),
        "holds no weights that can be read safely",
    ),
    Attack(
        "weights that execute, in the format before zip",
        lambda d: executes(
            d, lambda: torch.load(weights(d, Makes(d), _use_new_zipfile_serialization=False), weights_only=False)
        ),
        lambda d: _of_file(weights(d, Makes(d), _use_new_zipfile_serialization=False)),
        "holds no weights that can be read safely",
    ),
    Attack(
        "weights that are a bare pickle",
        lambda d: executes(d, lambda: pickle.loads(pickle.dumps(Makes(d)))),
        lambda d: _of_file(write(d / "weights.pth", pickle.dumps(Makes(d)))),
        "holds no weights that can be read safely",
    ),
    Attack(
        "a safetensors header without end",
        lambda d: raises(OverflowError, lambda: io.BytesIO(b"x").read(2**64)),
        lambda d: _of_file(write(d / "w.safetensors", (2**60).to_bytes(8, "little") + b"{}")),
        "holds no weights that can be read safely",
    ),
]


def huge_array() -> bytes:
    """A pickle of an array of 2^50 bytes, which numpy makes when it is rebuilt."""

    class Huge:
        def __reduce__(self) -> tuple[Any, ...]:
            return np.ndarray, ((2**50,), "u1")

    return pickle.dumps({b"data": Huge(), b"fine_labels": [0]})


def tar_of(folder: Path, *members: tuple[str, bytes, str]) -> Path:
    """A tar of (name, kind, target); regular files hold "stolen" and a label."""
    with tarfile.open(folder / "train-0.tar", "w") as tar:
        for name, kind, target in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            data = b"0" if name.endswith(".cls") else b"stolen"
            info.size = len(data) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(data) if kind == tarfile.REGTYPE else None)
    return folder


def unpacked(folder: Path, *members: tuple[str, bytes, str]) -> bool:
    """Whether unpacking without a filter puts something beside the folder that it is unpacked into."""
    tar_of(folder, *members)
    inner = folder / "inner"
    inner.mkdir()
    with tarfile.open(folder / "train-0.tar") as tar:
        tar.extraction_filter = lambda member, path: member  # whatever Python's default is; before 3.11.4 there is none
        tar.extractall(inner)
    outside = {path.name for path in folder.iterdir()} - {"inner", "train-0.tar"}
    links = any(path.is_symlink() or path.stat().st_nlink > 1 or path.is_fifo() for path in inner.rglob("*"))
    for name in outside:
        (folder / name).unlink()
    return bool(outside) or links


def tar_attack(name: str, *members: tuple[str, bytes, str], said: str) -> Attack:
    def listing(folder: Path) -> Any:
        return listed(tar_of(folder, *members), "webdataset", train="train-*.tar")

    return Attack(name, lambda d: unpacked(d, *members), listing, said)


LABEL = ("a.cls", tarfile.REGTYPE, "")
LINK, PIPE = "is a link to .*, without bytes of its own", "a device or the like, no file"
TAR_ATTACKS = [
    tar_attack("a member that climbs out", ("../stolen.jpg", tarfile.REGTYPE, ""), said="has no label"),
    tar_attack("a link out of the folder", ("a.jpg", tarfile.SYMTYPE, "/etc/passwd"), LABEL, said=LINK),
    tar_attack("a hard link", ("b.jpg", tarfile.REGTYPE, ""), ("a.jpg", tarfile.LNKTYPE, "b.jpg"), LABEL, said=LINK),
    tar_attack("a pipe that is never written", ("a.jpg", tarfile.FIFOTYPE, ""), LABEL, said=PIPE),
    Attack(
        "a sample's JSON that is deep",
        lambda d: raises(RecursionError, lambda: json.loads(DEEP_JSON)),
        lambda d: listed(deep_sample(d), "webdataset", train="train-*.tar"),
        "nested too deep",
    ),
    Attack(
        "a list that climbs out",
        lambda d: (d / "in" / "../secret.jpg").resolve() == (d / "secret.jpg").resolve(),
        lambda d: listed(write(d / "in" / "list.txt", "../secret.jpg 0\n").parent, "list", train="list.txt"),
        "image ../secret.jpg does not lie under the root",
    ),
    Attack(
        "a list of absolute paths",
        lambda d: d / "/etc/passwd" == Path("/etc/passwd"),
        lambda d: listed(write(d / "list.txt", "/etc/passwd 0\n").parent, "list", train="list.txt"),
        "image /etc/passwd does not lie under the root",
    ),
    Attack(
        "class names of another encoding",
        lambda d: raises(UnicodeDecodeError, lambda: write(d / "names", b"caf\xe9").read_text("utf-8")),
        lambda d: listed(write(d / "names", b"caf\xe9").parent, "list", train="l", classes="names"),
        "names is not UTF-8 text",
    ),
    Attack(
        "iNaturalist's JSON, deep",
        lambda d: raises(RecursionError, lambda: json.loads('{"images": ' + DEEP_JSON)),
        lambda d: listed(write(d / "t.json", '{"images": ' + DEEP_JSON).parent, "inaturalist", train="t.json"),
        "t.json is not JSON",
    ),
]


def deep_sample(folder: Path) -> Path:
    with tarfile.open(folder / "train-0.tar", "w") as tar:
        for name, data in (("a.jpg", b"x"), ("a.json", DEEP_JSON.encode())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return folder


def plugin(folder: Path) -> str:
    """The name of a module that executes when it is imported."""
    name = f"hostile_{sha256(str(folder).encode()).hexdigest()[:12]}"
    write(folder / f"{name}.py", f"import os\nos.mkdir({str(folder / FLAG)!r})\n")
    return name


def imports(folder: Path) -> bool:
    sys.path.insert(0, str(folder))
    try:
        importlib.import_module(plugin(folder))
    finally:
        sys.path.remove(str(folder))
    return (folder / FLAG).is_dir()


def commands(folder: Path, name: str) -> None:
    """The script for a cluster of a table whose row has this name."""
    table = load_table(
        write(folder / "t.yaml", yaml.safe_dump({"title": "t", "recipe": "demo", "rows": [{"method": name}]}))
    )
    write_commands([Job(table, table.rows[0], 1, folder / "out", None, (), None)], folder / "commands.sh")
    lines = (folder / "commands.sh").read_text().splitlines()
    assert not [line for line in lines if line.startswith("mkdir")]


def overridden(folder: Path, key: str) -> Any:
    return load_recipe(recipe(folder, TINY), [key])


class Settings:
    """What a naive --set walks: attributes."""

    lr = 0.1


def naive_set(path: str, value: object) -> bool:
    """--set by getattr and setattr; whether another class than an own setting was changed."""
    target: Any = Settings()
    *parts, last = path.split(".")
    for part in parts:
        target = getattr(target, part)
    before = Settings.lr
    setattr(target, last, value)
    harmed = Settings.lr != before
    Settings.lr = before
    return harmed


CODE_ATTACKS = [
    Attack(
        "a command as shards",
        lambda d: subprocess.run(f"mkdir {d}/{FLAG}", shell=True).returncode == 0,
        lambda d: Storage(f"pipe:mkdir {d}/{FLAG} {{name}}"),
        "would run a command",
    ),
    Attack(
        "a chain of file systems",
        lambda d: "::" in "simplecache::pipe:x",
        lambda d: Storage("simplecache::pipe:x"),
        "chains file systems",
    ),
    Attack(
        "a reference file, which is a template that is executed",
        lambda d: "reference://x".startswith("reference"),
        lambda d: Storage("reference://x"),
        "would run a command",
    ),
    Attack(
        "a method that is a module of its own",
        imports,
        lambda d: overridden(d, f"loss.method={plugin(d)}:x"),
        "--allow-code",
    ),
    Attack(
        "a backbone that is a module of its own",
        imports,
        lambda d: load_plugin(f"{plugin(d)}:x", "model.backbone"),
        "--allow-code",
    ),
    Attack(
        "a source that is a module of its own",
        imports,
        lambda d: listed(d, f"{plugin(d)}:Card"),
        "--allow-code",
    ),
    Attack(
        "--set of a class",
        lambda d: naive_set("__class__.lr", 9),
        lambda d: overridden(d, "optimizer.__class__.lr=9"),
        "unknown key 'optimizer.__class__'",
    ),
    Attack(
        "--set of a name with underscores at the top",
        lambda d: naive_set("__class__.lr", 9),
        lambda d: overridden(d, "__init__.__globals__=9"),
        "unknown key '__init__'",
    ),
    Attack(
        "--set without a value",
        lambda d: raises(ValueError, lambda: dict([("name",)])),  # type: ignore[list-item]
        lambda d: overridden(d, "name"),
        "write key.path=value",
    ),
    Attack(
        "--set through a number",
        lambda d: raises(TypeError, lambda: operator.getitem(yaml.safe_load("3"), "x")),
        lambda d: overridden(d, "seed.x=1"),
        "'seed' is a setting, not a section",
    ),
    Attack(
        "a row's name that is a command in the script",
        lambda d: (
            subprocess.run(["sh"], input=f"# x\nmkdir {d}/{FLAG}\n", text=True).returncode == 0 and (d / FLAG).is_dir()
        ),
        lambda d: commands(d, f"x\nmkdir {d}/{FLAG}"),
        taken=True,
    ),
]


def hostfile(folder: Path) -> Path:
    """A host whose name is an option of ssh, which runs it."""
    return write(folder / "hosts", f"-oProxyCommand=mkdir${{IFS}}{folder / FLAG} slots=2\n")


CODE_ATTACKS.append(
    Attack(
        "a host that is an option of ssh",
        lambda d: not subprocess.run(["sh", "-c", hostfile(d).read_text().split()[0].partition("=")[2]]).returncode,
        lambda d: read_hostfile(hostfile(d)),
        "is no name of a host",
    )
)
ATTACKS = [*YAML_ATTACKS, *JSON_ATTACKS, *PICKLE_ATTACKS, *TAR_ATTACKS, *CODE_ATTACKS]
