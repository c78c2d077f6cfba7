"""A typo is told before torch is loaded; of DeepSpeed's lines the one that says nothing new is left out."""

import logging
import subprocess
import sys

import pytest

from paco_ds.command import silence_accelerator_choice

SCRIPT = """
import sys
from importlib import import_module
try:
    import_module(sys.argv[1]).main(sys.argv[2:])
finally:
    assert "torch" not in sys.modules
"""


@pytest.mark.parametrize(
    ("module", "arguments", "told"),
    [
        ("paco_ds.train", ("--config", "demo", "--set", "step.micro_bach=3"), "nearest valid name: 'step.micro_batch'"),
        ("paco_ds.train", ("--set", "step.micro_bach=3"), "nearest valid name: 'step.micro_batch'"),
        ("paco_ds.train", ("--config", "demoo"), "no recipe demoo"),
        ("paco_ds.evaluate", ("--run", "absent"), "no recipe absent/recipe.yaml"),
    ],
)
def test_a_typo_is_told_before_torch_is_loaded(module, arguments, told, tmp_path):
    """On one line, with status 2, and nothing is written."""
    command = [sys.executable, "-c", SCRIPT, module, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_other_lines_of_deepspeed_come_through(caplog):
    """Only that it chose the CPU is dropped."""
    silence_accelerator_choice()
    log = logging.getLogger("DeepSpeed")
    log.propagate = True
    log.warning("Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.")
    log.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
