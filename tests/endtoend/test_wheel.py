"""What a wheel holds, used from an empty folder."""

import sys
from importlib.metadata import PathDistribution

import paco_ds

HELP = """
import sys
from importlib import import_module
try:
    import_module(sys.argv[1]).main(["--help"])
finally:
    assert "torch" not in sys.modules, "--help waits for torch"
"""


RESOLVE = """
from paco_ds.config.load import load_recipe
print(load_recipe("suggested/recipe.yaml").engine.deepspeed)
print(load_recipe("suggested/recipe.yaml", ["engine.deepspeed=zero2"]).engine.deepspeed)
"""


def test_every_command_has_help_with_an_example(site, run):
    """At once: none of them imports torch for it."""
    (about,) = site.glob("paco_ds-*.dist-info")
    installed = PathDistribution(about)
    assert installed.version == paco_ds.__version__
    commands = installed.entry_points.select(group="console_scripts")
    assert len(commands) == 16
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


def test_shards_of_the_shipped_card_are_built_and_suggest_a_recipe(site, run):
    """The recipe reads, and the DeepSpeed JSONs that it may name are in the wheel."""
    build = site / "bin" / "paco-build-shards"
    done = run(build, "build", "fashion-mnist-lt", "--output", "mine")
    assert done.returncode == 0, done.stderr
    done = run(build, "suggest", "mine")
    assert done.returncode == 0, done.stderr
    done = run(sys.executable, "-c", RESOLVE)
    assert done.stdout.splitlines() == ["auto", f"{site}/paco_ds/shipped/ds_configs/zero2.json"], done.stderr
