"""Write a trained model for other programs.

    paco-export runs/inat --to onnx --output model.onnx

Every file is checked before it is kept: on random images the written model must answer as ours does in float32.

example:
  paco-export runs/inat --to onnx --output model.onnx
  paco-export runs/inat --to hf --output inat-model
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from paco_ds.command import one_line_on_interrupt, report_user_errors, say
from paco_ds.config.plugins import AllowCode
from paco_ds.errors import UserError

FORMATS = ("safetensors", "torchvision", "timm", "onnx", "torch-export", "hf")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = _parser().parse_args(argv)
    with one_line_on_interrupt(), report_user_errors():
        if arguments.output.exists():
            raise UserError(f"{arguments.output} is there already: remove it, or give another --output")
        from paco_ds.evaluation.exporter import export  # torch: only who asks for it waits
        from paco_ds.evaluation.predictor import load

        export(load(arguments.run, weights=arguments.weights), arguments.to, arguments.output, Path(arguments.run))
        say(f"written: {arguments.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run directory of a training")
    parser.add_argument("--to", choices=FORMATS, required=True, help="see docs/predict.md")
    parser.add_argument("--output", type=Path, required=True, help="file, or folder of `hf`; must not be there")
    parser.add_argument("--weights", choices=("query", "key", "ema"), help="the run's evaluation.weights by default")
    parser.add_argument("--allow-code", action=AllowCode)
    return parser


if __name__ == "__main__":
    sys.exit(main())
