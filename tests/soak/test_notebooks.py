"""The notebooks and the first page, run as a reader does: each cell and each command, in an empty folder."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Of torch in a kernel, on a machine that runs other things too."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize("path", sorted((DOCS / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs(tmp_path, record, path):
    """In a kernel of its own."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    record(f"notebook {path.stem}", "every cell ran", True)


def test_the_first_page_does_what_it_says(tmp_path, record, monkeypatch):
    """Its commands after the installation, word for word."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/bin:/usr/bin")
    text = (DOCS / "start.md").read_text(encoding="utf-8").partition("## Images to shards")[2]
    commands = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    (python,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    subprocess.run([sys.executable, "-c", python], cwd=tmp_path, check=True)
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 201
    record("docs/start.md, every command", "ran", True)
