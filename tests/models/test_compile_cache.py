"""What a killed start left of compiled code is removed, and nothing else."""

import sysconfig
from pathlib import Path

import pytest
from filelock import FileLock

from paco_ds.errors import RecipeError
from paco_ds.models import compile_cache
from paco_ds.models.compile_cache import mend_compile_cache, remove_unfinished_libraries


@pytest.fixture
def library() -> bytes:
    """Of a module of Python's own."""
    folder = Path(sysconfig.get_path("stdlib")) / "lib-dynload"
    return min(folder.glob("*.so"), key=lambda path: path.stat().st_size).read_bytes()


@pytest.fixture
def cache(tmp_path):
    """`cache(name, data)`: a library of that name."""

    def add(name, data):
        path = tmp_path / name[:2] / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return path

    return add


@pytest.mark.parametrize("left", [0, 10, 64, 0.5, -1])
def test_a_library_that_ends_too_early_is_removed(cache, tmp_path, library, left):
    """At its first byte, in its header, after it, in the middle, before its last byte."""
    end = int(len(library) * left) if isinstance(left, float) else left
    whole, cut = cache("ab1.main.so", library), cache("ab2.so", library[:end])
    assert remove_unfinished_libraries(tmp_path) == [cut]
    assert whole.exists()
    assert not cut.exists()


def test_zeros_where_the_header_will_be_are_no_library(cache, tmp_path, library):
    """A linker may write its end first."""
    cut = cache("ab2.so", bytes(len(library)))
    assert remove_unfinished_libraries(tmp_path) == [cut]


def test_one_that_is_being_written_is_left(cache, tmp_path, library):
    """Its writer holds torch's lock."""
    cut = cache("ab2.main.so", library[:100])
    (tmp_path / "locks").mkdir()
    with FileLock(tmp_path / "locks" / "ab2.lock"):
        assert remove_unfinished_libraries(tmp_path) == []
    assert remove_unfinished_libraries(tmp_path) == [cut]


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """`compiler(*errors)`: torch compiles with these results, one after another; headers are in tmp_path."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("torch._inductor.runtime.cache_dir_utils.default_cache_dir", lambda: str(tmp_path))
    (tmp_path / "precompiled_headers").mkdir()
    (tmp_path / "precompiled_headers" / "a.h.gch").touch()

    def results(*errors):
        left = list(errors)

        def compile_one(function):
            if error := left.pop(0):
                raise error

        monkeypatch.setattr(compile_cache, "_compile", compile_one)
        return left

    return results


def test_a_header_that_does_not_compile_is_made_again(compiler, tmp_path):
    left = compiler(RuntimeError("cannot read PCH file"), None)
    mend_compile_cache()
    assert left == []
    assert not (tmp_path / "precompiled_headers" / "a.h.gch").exists()


def test_a_compiler_that_works_keeps_its_header(compiler, tmp_path):
    compiler(None)
    mend_compile_cache()
    assert (tmp_path / "precompiled_headers" / "a.h.gch").exists()


def test_a_host_without_a_compiler_is_one_line(compiler):
    compiler(RuntimeError("g++: no"), RuntimeError("g++: not found\nmore"))
    with pytest.raises(
        RecipeError, match=r"engine.compile: .*apt install g\+\+.*engine.compile=false.*g\+\+: not found$"
    ):
        mend_compile_cache()
