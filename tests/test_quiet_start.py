"""Mistakes in settings are reported before torch is loaded; DeepSpeed's lines that say nothing new are left out."""

import logging
import subprocess
import sys
import warnings

import pytest

from paco_ds.command import silence_known_noise

SCRIPT = """
import sys
import warnings
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
        ("paco_ds.evaluate", ("--run", "absent"), "absent is not the run directory of a training"),
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


def test_deepspeed_does_not_load_mlflow():
    """Which takes longer than the rest of it; who logs to MLflow still has it."""
    script = (
        "import sys, importlib.util; from paco_ds.distributed.load_deepspeed import deepspeed; "
        "assert deepspeed.initialize and 'mlflow' not in sys.modules and importlib.util.find_spec('mlflow')"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_other_lines_of_deepspeed_come_through():
    """Only that it chose the CPU is dropped."""
    log, heard = logging.getLogger("DeepSpeed"), []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    before = list(log.filters)
    silence_known_noise()
    log.addHandler(handler)
    try:
        log.warning("Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.")
        log.warning("something else")
    finally:
        log.removeHandler(handler)
        log.filters[:] = before
    assert heard == ["something else"]


def test_deepspeed_and_torch_are_silent_of_what_no_user_can_act_on():
    """The optimizer that DeepSpeed does not know, and its calls of deprecated functions; others are heard."""
    log, heard = logging.getLogger("DeepSpeed"), []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    before = list(log.filters)
    where = ("c10d_logger.py", 1, "torch.distributed.c10d_logger")
    deprecated = "`torch.distributed.{}` is deprecated. Please use another."
    try:
        log.addHandler(handler)
        with warnings.catch_warnings(record=True) as warned:
            warnings.resetwarnings()
            warnings.simplefilter("always")
            silence_known_noise()
            log.warning("**** You are using ZeRO with an untested optimizer, proceed with caution *****")
            log.warning("the loss is strange")
            warnings.warn_explicit(deprecated.format("all_gather_into_tensor"), FutureWarning, *where)
            warnings.warn_explicit(deprecated.format("broadcast"), FutureWarning, *where)
            warnings.warn_explicit(deprecated.format("reduce_scatter_tensor"), FutureWarning, "mine.py", 1, "mine")
    finally:
        log.removeHandler(handler)
        log.filters[:] = before
    assert heard == ["the loss is strange"]
    assert [str(each.message).split("`")[1] for each in warned] == [
        "torch.distributed.broadcast",
        "torch.distributed.reduce_scatter_tensor",
    ]
