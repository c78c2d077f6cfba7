"""Say before a run what it will need: `preflight.py --plan --recipe R --ranks N --gpu-memory 80GiB`.

Without shards on this machine: `--images N --classes C`. The model is never built in memory.
"""

from __future__ import annotations

import argparse
import json

from rich.console import Console

from paco_ds.command import report_user_errors
from paco_ds.planning.sizes import parse_bytes
from paco_ds.recipe_file import load_recipe


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 if the plan fits or nothing was asked, 1 if it does not."""
    arguments = _parser().parse_args(argv)
    with report_user_errors():
        recipe = load_recipe(arguments.recipe, arguments.set)
        memory = parse_bytes(arguments.gpu_memory, "--gpu-memory") if arguments.gpu_memory else None
        from paco_ds.planning.plan import find_data, make_plan  # brings DeepSpeed, after what can be refused early
        from paco_ds.planning.report import as_json, print_plan

        plan = make_plan(
            recipe,
            arguments.ranks,
            find_data(recipe, arguments.images, arguments.classes),
            gpu_memory=memory,
            images_per_second=arguments.images_per_second,
            device=arguments.device,
        )
    if arguments.json:
        print(json.dumps(as_json(plan)))
    else:
        print_plan(plan, Console(width=arguments.width))
    return 1 if plan.verdict == "does not fit" else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", required=True, help="plan memory, traffic and time of a run")
    parser.add_argument("--recipe", required=True, help="recipe, YAML; see ds_configs/recipes/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override a setting")
    parser.add_argument("--ranks", type=int, required=True, help="ranks of the job, over all hosts")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="of each GPU: 80GiB is 2^30 bytes, 80GB is 10^9")
    parser.add_argument("--images-per-second", type=float, help="of the whole job, as a run of it has shown")
    parser.add_argument("--images", type=int, help="training images, where there are no shards yet")
    parser.add_argument("--classes", type=int, help="classes, where there are no shards yet")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what the ranks run on")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of tables")
    parser.add_argument("--width", type=int, default=120, help="columns of the tables")
    return parser
