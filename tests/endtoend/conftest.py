"""The project as a user has it: a wheel, installed, and used from an empty folder. The checkout plays no part."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """Folder where the wheel is installed; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    for part in ("paco_ds", "ds_configs", "shards", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        (folder / "source").mkdir(exist_ok=True)
        copy(ROOT / part, folder / "source" / part)
    pip = (sys.executable, "-m", "pip")
    wheel = (*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "source")
    subprocess.run(wheel, check=True)
    (built,) = folder.glob("paco_ds-*.whl")
    install = (*pip, "install", "--quiet", "--no-deps", "--no-index", "--target", folder / "site", built)
    subprocess.run(install, check=True)
    return folder / "site"


@pytest.fixture
def run(site, tmp_path):
    """`run(command, ...)`: its completed process, started in an empty folder with the wheel's package first."""

    def started(*command):
        environment = {**os.environ, "PYTHONPATH": str(site)}
        words = [str(word) for word in command]
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)

    return started
