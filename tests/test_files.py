"""Files are written whole or not at all, and what storage refuses is said with the remedy."""

import errno
import os

import pytest

from paco_ds.errors import StorageError
from paco_ds.files import remove_partial, replace_text, storage_errors, whole_file


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "make room there"),
        (errno.EDQUOT, "have the quota raised"),
        (errno.EROFS, "have it mounted for writing"),
        (errno.EACCES, "make it writable"),
        (errno.ENOTDIR, "a file is in the way"),
        (errno.ENOENT, "its folder is gone"),
        (errno.ESTALE, "its folder is gone"),
        (errno.EIO, "the kernel log of this host tells more"),
    ],
)
def test_what_storage_refuses_is_one_line_with_path_and_remedy(tmp_path, monkeypatch, code, remedy):
    """The file keeps its content, and nothing unfinished is left beside it."""
    path = replace_text(tmp_path / "report.html", "before")

    def refuse(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("paco_ds.files.os.fsync", refuse)
    with pytest.raises(StorageError) as error:
        replace_text(path, "after")
    assert str(error.value).startswith(f"{path} cannot be written: {os.strerror(code)}; ")
    assert remedy in str(error.value)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["before"]


def test_a_folder_that_is_missing_or_a_file_is_named(tmp_path):
    """By the kernel itself."""
    (tmp_path / "file").write_text("")
    for folder in ("file", "missing"):
        with pytest.raises(StorageError, match=rf"{folder}/x cannot be written"):
            replace_text(tmp_path / folder / "x", "")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(errno.ECONNRESET, "reset"),
        TimeoutError(errno.ETIMEDOUT, "timed out"),
        FileNotFoundError(errno.ENOENT, "no such file", "/images/cat.jpg"),
        ValueError("a mistake"),
    ],
)
def test_errors_of_what_was_read_pass_through(tmp_path, error):
    """They are not about the file that is written."""
    with pytest.raises(type(error)) as raised, whole_file(tmp_path / "x"):
        raise error
    assert raised.value is error
    assert list(tmp_path.iterdir()) == []


def test_an_ancestor_that_cannot_be_made_is_of_the_path(tmp_path):
    """As when --output lies under a file."""
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "a" / "b"
    said = "file/a/b cannot be written: Not a directory; a file is in the way"
    with pytest.raises(StorageError, match=said), storage_errors(place):
        place.mkdir(parents=True)


def test_two_writers_of_a_file_each_write_it_whole(tmp_path):
    """The one that ends last is there; not lines of both."""
    with whole_file(tmp_path / "a.csv") as first:
        first.write(b"first")
        with whole_file(tmp_path / "a.csv") as second:
            second.write(b"2nd")
        assert (tmp_path / "a.csv").read_bytes() == b"2nd"
    assert (tmp_path / "a.csv").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_unfinished_files_of_a_killed_writer_are_removed(tmp_path):
    """And nothing else."""
    for name in (".report.html.partial", "report.html", "x.partial", ".hidden"):
        (tmp_path / name).write_text("")
    remove_partial(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "x.partial", ".hidden"}
