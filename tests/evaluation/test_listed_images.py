"""Which images a command is given: every one of a place, or a line that says why not."""

import errno
import io
import os
import sys
import tarfile
from types import SimpleNamespace

import pytest

from paco_ds.errors import UserError
from paco_ds.evaluation.images import list_images


def names(*places):
    return [os.path.basename(image.name) for image in list_images([str(place) for place in places])]


def tar_of(path, *members):
    """A tar of empty images; a member `a->b` is a hard link."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            name, _, target = member.partition("->")
            info = tarfile.TarInfo(name)
            if target:
                info.type, info.linkname = tarfile.LNKTYPE, target
            tar.addfile(info)
    return path


def test_linked_folders_are_followed_once(tmp_path):
    """As in a build: a link back, or to what is listed anyway, adds nothing."""
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for folder in (photos / "a", elsewhere):
        folder.mkdir(parents=True)
        (folder / f"{folder.name}.png").touch()
    (photos / "linked").symlink_to(elsewhere)
    (photos / "back").symlink_to(photos)
    (photos / "twice").symlink_to(photos / "a")
    assert names(photos) == ["a.png", "elsewhere.png"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """By the system's own error, which root never meets."""
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuses(path):
        if os.path.basename(path) == "closed":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuses)
    with pytest.raises(UserError, match="closed cannot be read: Permission denied"):
        names(tmp_path)


def test_a_pipe_among_images_is_no_image(tmp_path):
    """Reading it would wait for a writer."""
    os.mkfifo(tmp_path / "x.jpg")
    (image,) = list_images([str(tmp_path)])
    with pytest.raises(ValueError, match="no_file"):
        image.read()


def test_paths_on_standard_input_need_not_be_utf_8(monkeypatch):
    """Names of files are bytes, whatever the terminal's encoding."""
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"a.png\r\n\ncaf\xe9.png\n")))
    assert names("-") == ["a.png", os.fsdecode(b"caf\xe9.png")]


def test_standard_input_that_is_closed_is_said(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="standard input, which is closed"):
        names("-")


def test_tars_joined_by_cat_or_cut_lose_no_image_silently(tmp_path):
    """As in a build, a reader would end at the first one's end."""
    first, second = (tar_of(tmp_path / name, f"{name}.png").read_bytes() for name in ("a.tar", "b.tar"))
    assert names(tmp_path / "a.tar") == ["a.tar.png"]
    (tmp_path / "a.tar").write_bytes(first + second)
    with pytest.raises(UserError, match=r"a.tar goes on after its end"):
        names(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(first[:512])
    with pytest.raises(UserError, match=r"a.tar is damaged after byte 512"):
        names(tmp_path / "a.tar")


def test_a_hard_link_in_a_tar_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"b.png is a link to a.png, .*--hard-dereference"):
        names(tar_of(tmp_path / "x.tar", "a.png", "b.png->a.png"))
