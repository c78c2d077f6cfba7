"""A wheel, installed and used from an empty folder: the checkout plays no part."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

import paco_ds

ROOT = Path(__file__).parents[2]
HELP = """
import sys
from importlib import import_module
try:
    import_module(sys.argv[1]).main(["--help"])
finally:
    assert "torch" not in sys.modules, "--help waits for torch"
"""


@pytest.fixture(scope="module")
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


def test_every_command_has_help_with_an_example(site, run):
    """At once: none of them imports torch for it."""
    (about,) = site.glob("paco_ds-*.dist-info")
    installed = PathDistribution(about)
    assert installed.version == paco_ds.__version__
    commands = installed.entry_points.select(group="console_scripts")
    assert len(commands) == 9
    for command in commands:
        assert (site / "bin" / command.name).exists()
        done = run(sys.executable, "-c", HELP, command.module)
        assert done.returncode == 0, done.stderr
        _, example, text = done.stdout.partition("example")
        assert example, command.name
        assert f"  {command.name} " in text


def test_a_wheel_finds_what_ships_inside_itself(site, run):
    """Names are looked up in the wheel, and nearest ones are named."""
    done = run(site / "bin" / "paco-reproduce", "--table", "dmo", "--output", "o")
    assert done.returncode == 2
    assert (
        f"no table dmo: there is no such file, nor that name in {site}/paco_ds/shipped/ds_configs/tables" in done.stderr
    )
    done = run(site / "bin" / "paco-theory", "--card", "fashion-mnist-lt", "--queue", "256")
    assert "Fashion-MNIST-LT, train: 2,478 images of 10 classes" in done.stdout, done.stderr


def test_shards_of_the_shipped_card_are_built_and_suggest_a_recipe(site, run, tmp_path):
    """The recipe's DeepSpeed JSON is there."""
    build = site / "bin" / "paco-build-shards"
    done = run(build, "build", "fashion-mnist-lt", "--output", "mine")
    assert done.returncode == 0, done.stderr
    done = run(build, "suggest", "mine")
    assert done.returncode == 0, done.stderr
    (json,) = [line.split()[-1] for line in (tmp_path / "suggested/recipe.yaml").open() if "deepspeed:" in line]
    assert (tmp_path / "suggested" / json).is_file()


@pytest.mark.timeout(600)
def test_the_launcher_with_train_alone_trains_the_demo_to_its_report(site, run, tmp_path):
    """Shortened by overrides only: its shards are built first, in the working directory, by one rank."""
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    where = ("--hostfile", "hosts", "--no_ssh_check", "--master_addr", "127.0.0.1", "--master_port", 29616)
    short = ("model.width=4", "schedule.epochs=1", "schedule.warmup_epochs=0", "metrics.port=19420")
    launch = (Path(sys.executable).with_name("deepspeed"), *where, site / "paco_ds" / "train.py")
    done = run(*launch, *(f"--set={override}" for override in short))
    assert done.returncode == 0, done.stderr
    assert "no --config: training the recipe demo into runs/demo; for another give --config" in done.stdout
    assert "report: runs/demo/report.html" in done.stdout
    assert (tmp_path / "data/fashion-mnist-lt/manifest.json").exists()
    assert not (site / "paco_ds/shipped/data").exists()
