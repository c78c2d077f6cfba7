"""Make a run of a checkpoint that another project wrote: PaCo, GPaCo, RIDE, MoCo, timm or torchvision.

    paco-import moco_ckpt.pth.tar --config inaturalist2018_resnet50 --output runs/published

The recipe names the shards, whose classes must be in the order of the file's, and the network; of torchvision's files
and of folders with timm's config.json it is recognised. The run is one of step 0 with these weights: it is evaluated,
predicts, is exported, and `paco-train` goes on from it. PaCo's queue is taken over. A file without a classifier, as
MoCo's, or of other classes becomes a run to train with --new-classifier.

examples:
  paco-import moco_ckpt.best.pth.tar --config imagenet_lt_resnet50 --output runs/published
  paco-import model_best.pth --config RIDE.yaml --set model.experts=3 --output runs/ride
  paco-import model.safetensors --config resnet50 --set model.backbone=timm:resnet50 --output runs/timm
  paco-import moco_v2_800ep.pth.tar --config imagenet_lt_resnet50 --new-classifier --output runs/moco
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from paco_ds.command import one_line_on_interrupt, report_user_errors, say, silence_known_noise
from paco_ds.config.plugins import AllowCode


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = _parser().parse_args(argv)
    silence_known_noise()
    with one_line_on_interrupt(), report_user_errors():
        from paco_ds.training.imported import import_published  # torch: only who asks for it waits

        imported = import_published(
            arguments.checkpoint,
            arguments.config,
            arguments.output,
            arguments.set,
            new_classifier=arguments.new_classifier,
        )
        epoch = imported.published.epoch
        trained = "" if epoch is None else f", trained for {epoch} epochs"
        say(
            f"imported {imported.taken} tensors of {arguments.checkpoint} ({imported.backbone}){trained}, into "
            f"{arguments.output}"
        )
        if imported.published.kind != "paco":
            say("images are normalised with the mean and deviation of the shards: compare them with the file's")
        if imported.fresh:
            say(f"not in the file, and drawn from the recipe's seed: {', '.join(imported.fresh)}")
        if "classifier" in imported.fresh:
            say(f"this run knows no class yet: train it with paco-train --config {arguments.output}/recipe.yaml")
        if imported.unused:
            say(f"not used, since this model has no place for them: {', '.join(imported.unused)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="file of weights, as moco_ckpt.pth.tar, or a hub's folder")
    parser.add_argument("--config", required=True, help="recipe of that model: a file, or the name of one that ships")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value")
    parser.add_argument(
        "--new-classifier", action="store_true", help="draw the classifier anew: the file has none, or other classes"
    )
    parser.add_argument("--output", type=Path, required=True, help="run directory, without checkpoints")
    parser.add_argument("--allow-code", action=AllowCode)
    return parser


if __name__ == "__main__":
    sys.exit(main())
