"""Make a run of a checkpoint that the authors' code of PaCo or GPaCo wrote.

    paco-import moco_ckpt.pth.tar --config inaturalist2018_resnet50 --output runs/published

The recipe names the network and the shards, whose classes must be in the order of the file's. The run is one of step 0
with these weights and this queue: it is evaluated, predicts, is exported, and `paco-train` goes on from it.

example:
  paco-import moco_ckpt.best.pth.tar --config imagenet_lt_resnet50 --output runs/published
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from paco_ds.command import one_line_on_interrupt, report_user_errors, say
from paco_ds.config.plugins import AllowCode


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = _parser().parse_args(argv)
    with one_line_on_interrupt(), report_user_errors():
        from paco_ds.training.imported import import_published  # torch: only who asks for it waits

        published = import_published(arguments.checkpoint, arguments.config, arguments.output, arguments.set)
        trained = "" if published.epoch is None else f", trained for {published.epoch} epochs"
        say(f"imported {len(published.model)} tensors of {arguments.checkpoint}{trained}, into {arguments.output}")
        if published.unused:
            say(f"not used, since this model has no place for them: {', '.join(published.unused)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="file of the authors' code, as moco_ckpt.best.pth.tar")
    parser.add_argument("--config", required=True, help="recipe of that model: a file, or the name of one that ships")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value")
    parser.add_argument("--output", type=Path, required=True, help="run directory, without checkpoints")
    parser.add_argument("--allow-code", action=AllowCode)
    return parser


if __name__ == "__main__":
    sys.exit(main())
