"""Names are text: printed as they are written, never as markup, and never as commands to the terminal."""

import io
import os

import pytest
from rich.console import Console
from rich.errors import MarkupError
from rich.table import Table

from paco_ds.command import Screen, say
from paco_ds.data.pack.card import name_of
from paco_ds.data.pack.command import main
from paco_ds.data.pack.image_bytes import BadImage
from paco_ds.data.pack.read import list_source
from paco_ds.data.pack.source import some
from paco_ds.data.pack.sources.folder import FolderCard
from paco_ds.errors import DataError, printable, redacted
from tests.data.tiny import encoded

NAMES = ["demo [/]", "birds [red] v2", "[bold]", "a :cat: b", r"C:\[data]", "<b>&amp;"]


def shown(screen_type: type[Console], name: str) -> str:
    """What a table titled with the name, a cell and a line of it look like."""
    out = io.StringIO()
    screen = screen_type(file=out, width=200)
    table = Table(name, title=f"of {name}")
    table.add_row(name)
    screen.print(table)
    screen.print(name)
    return out.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_printed_as_it_is_written(name):
    """In the title, header and cell of a table, and in a line."""
    assert shown(Screen, name).count(name) == 4


def test_a_plain_console_swallows_or_refuses_such_names():
    """The control: rich takes brackets for markup and :cat: for an emoji."""
    assert "[red]" not in shown(Console, "birds [red] v2")
    assert ":cat:" not in shown(Console, "a :cat: b")
    with pytest.raises(MarkupError):
        shown(Console, "demo [/]")


@pytest.mark.parametrize(
    "name", ["\x1b[2J", "\x1b]0;title\x07", "a\rb", "\x9b31m", "\x08\x08", "a\u202egpj.exe", "caf\udce9"]
)
def test_what_would_move_the_terminal_is_an_escape(name, capsys):
    """In tables, lines, errors and plain prints; what they print can be encoded."""
    say(name)
    for text in (shown(Screen, name), str(DataError(f"no {name}")), capsys.readouterr().out):
        assert printable(name) in text
        assert not set(text.encode().decode()) & set("\x1b\x07\r\x08\x9b\u202e")


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("https://me:pass@host/d/x.tar is missing", "https://***@host/d/x.tar is missing"),
        ("https://TOKEN@host/d", "https://***@host/d"),
        ("http://a:p@ss@host/", "http://***@host/"),
        ("sftp://me:pass@host/d", "sftp://***@host/d"),
        ("sftp://me@host/d", "sftp://me@host/d"),
        ("abfs://container@account.dfs.core.windows.net/d", "abfs://container@account.dfs.core.windows.net/d"),
        (
            "s3://b/k?X-Amz-Signature=ab&X-Amz-Credential=AK%2F1&v=2",
            "s3://b/k?X-Amz-Signature=***&X-Amz-Credential=***&v=2",
        ),
        ("https://h/d?sv=1&sig=ab%3D&token=c", "https://h/d?sv=1&sig=***&token=***"),
        (
            "pipe:curl -H 'Authorization: Bearer ab' -u me:pw h/{name}",
            "pipe:curl -H 'Authorization: Bearer ***' -u *** h/{name}",
        ),
        ("me@example.org, see https://h/a@b?page=2", "me@example.org, see https://h/a@b?page=2"),
    ],
)
def test_credentials_of_a_url_are_redacted(text, safe):
    """And once redacted, text stays as it is."""
    assert redacted(text) == safe == redacted(safe) == str(DataError(text))


def test_a_file_name_is_one_line_of_the_list_of_bad_images():
    """And no command to who prints the list; a data set behind a signed URL is not called by its signature."""
    assert str(BadImage("empty", "a\nb.jpg: good\x1b[2J")) == r"a\nb.jpg: good\x1b[2J: empty"
    assert some(["a\nb"]) == r"a\nb"
    assert name_of("https://host/birds/?sig=S1GNED") == "birds"


@pytest.mark.parametrize(
    ("options", "key"),
    [([], "name"), (["--name", "caf\udce9"], "name"), (["--name", "x", "--license", "\xe9\udce9"], "license")],
)
def test_a_data_set_whose_name_is_not_utf8_is_refused(tmp_path, capsys, options, key):
    """Before anything is built; the name is the root's where none is given. With a name, the root may be any."""
    root = tmp_path / "caf\udce9"
    (root / "train" / "cat").mkdir(parents=True)
    (root / "train" / "cat" / "a.jpg").write_bytes(encoded())
    words = ["build", "--source", "folder", "--root", str(root), "--output", str(tmp_path / "out")]
    assert main([*words, *options]) == 2
    assert f"--source folder: {key}: is not UTF-8 text, as the manifest is: give another" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*words, "--name", "cafe"]) == 0


def test_a_class_folder_whose_name_is_not_utf8_is_taken(tmp_path):
    """As it comes out of a zip from Windows; its name is stored with escapes."""
    folder = os.fsencode(tmp_path) + b"/train/caf\xe9"
    os.makedirs(folder)
    open(folder + b"/a.jpg", "wb").close()
    card = FolderCard(source="folder", name="x", license="", splits={"train": {"folder": "train"}})
    source = list_source(card, tmp_path)
    assert source.classes == (r"caf\udce9",)
    assert len(source.splits["train"]) == 1
