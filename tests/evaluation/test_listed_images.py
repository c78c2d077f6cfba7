"""Which images a command is given: every one of a place, or a line that says why not."""

import errno
import io
import os
import shutil
import sys
import tarfile
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from paco_ds.distributed.ranks import Ranks
from paco_ds.errors import UserError
from paco_ds.evaluation.image_job import Progress
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


def test_a_pattern_gives_each_image_once(tmp_path):
    """`**` names folders and what lies in them; a link that leads back adds nothing, a link to a file is a file."""
    (tmp_path / "x" / "y").mkdir(parents=True)
    for name in ("a.jpg", "x/b.jpg", "x/y/c.jpg", "x-1.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "x" / "back").symlink_to(tmp_path / "x")
    (tmp_path / "d.jpg").symlink_to("a.jpg")
    assert sorted(names(tmp_path / "**")) == ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "x-1.jpg"]
    assert names(tmp_path / "x*") == ["b.jpg", "c.jpg", "x-1.jpg"]
    assert names(tmp_path / "a.jpg", tmp_path) == ["a.jpg", "d.jpg", "x-1.jpg", "b.jpg", "c.jpg"]


def test_files_of_a_folder_that_are_no_images_are_counted_by_ending(tmp_path):
    """As the builder does; also a link whose target is not there."""
    for name in ("a.jpg", "b.tif", "c.TIF", "d.heic", "README", ".hidden"):
        (tmp_path / name).touch()
    (tmp_path / "more").symlink_to(tmp_path / "not-mounted")
    left_out = Counter()
    assert [os.path.basename(image.name) for image in list_images([str(tmp_path)], None, left_out)] == ["a.jpg"]
    assert left_out == {".tif": 2, ".heic": 1, "(no ending)": 1, "(link to nothing)": 1}


def test_the_command_says_at_its_end_what_was_left_out(capsys):
    progress = Progress([], Ranks(0, 1, 0, torch.device("cpu")), {".tif": 2, ".heic": 1})
    with pytest.raises(UserError, match=r"there is none in photos \(not images by their ending: 1 .heic, 2 .tif\)"):
        progress.require_images(["photos"])
    progress.add("a.jpg")
    assert progress.finish(None) == 0
    assert capsys.readouterr().err == "left out, not images by their ending: 1 .heic, 2 .tif\n"


def test_the_manifest_that_add_kept_gives_its_shards(striped_shards, tmp_path):
    for file in striped_shards.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path / file.name.replace("manifest", "manifest-1"))
    kept, whole = names(tmp_path / "manifest-1.json"), names(striped_shards)
    assert kept == whole
    shutil.copy(tmp_path / "manifest-1.json", tmp_path / "manifest.json")
    assert names(f"{tmp_path.parent}/{tmp_path.name}*/**") == whole


def test_a_folder_of_images_may_hold_a_manifest_of_another_program(tmp_path):
    """As those of web pages; one that is damaged counts as ours, and is an error."""
    (tmp_path / "a.jpg").touch()
    (tmp_path / "manifest.json").write_text('{"name": "gallery"}')
    assert names(tmp_path) == names(tmp_path / "*") == ["a.jpg"]
    (tmp_path / "manifest.json").write_text('{"format": "paco_')
    with pytest.raises(UserError, match=r"manifest\.json is not JSON"):
        names(tmp_path)


def test_tars_in_capitals_are_read_and_compressed_ones_refused(tmp_path):
    assert names(tar_of(tmp_path / "T.TAR", "a.png")) == ["a.png"]
    for name in ("t.tar.gz", "t.TGZ"):
        (tmp_path / name).touch()
        with pytest.raises(UserError, match=rf"{name} is a compressed tar, .*: unpack it"):
            names(tmp_path / name)


def test_a_byte_order_mark_is_no_part_of_the_first_path(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"\xef\xbb\xbfa.png\r\nb.png\n")))
    assert names("-") == ["a.png", "b.png"]
