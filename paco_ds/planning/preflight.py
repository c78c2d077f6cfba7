"""Plan a run before it starts, check its nodes, and show its views.

    paco-preflight --plan --recipe R --ranks N --gpu-memory 80GiB    memory, traffic and time
    paco-preflight --workers --recipe R --gpus-per-node 8            loader workers that feed a node's GPUs
    paco-preflight --launch hosts --recipe R                         every node: versions, devices, shards, network
    paco-preflight --views sheet.png --recipe R                      both views of images from the shards

Without shards on this machine --plan takes `--images N --classes C`. A plan never allocates the model.

example:
  paco-preflight --plan --recipe imagenet_lt_resnet50 --ranks 4 --gpu-memory 80GiB --images 115846 --classes 1000
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from paco_ds.command import Screen, one_line_on_interrupt, report_user_errors, say, silence_known_noise
from paco_ds.config.plugins import AllowCode
from paco_ds.errors import UserError
from paco_ds.planning.sizes import parse_bytes


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 if all is well, 1 if the plan does not fit or workers are too few."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    asked = {"--plan": _plan, "--workers": _workers, "--launch": _launch, "--views": _views}
    chosen = [work for option, work in asked.items() if getattr(arguments, option.strip("-"))]
    if not chosen:
        parser.error(f"say what to do: {', '.join(asked)}, or several of them")
    silence_known_noise()
    with one_line_on_interrupt(), report_user_errors():
        return max(work(arguments) for work in chosen)


def _plan(arguments: argparse.Namespace) -> int:
    from paco_ds.config.load import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.set)
    if arguments.ranks is None:
        raise UserError("--plan needs --ranks N, the ranks of the job over all hosts")
    memory = parse_bytes(arguments.gpu_memory, "--gpu-memory") if arguments.gpu_memory else None
    from paco_ds.planning.plan import find_data, make_plan  # imports DeepSpeed, after the quick checks
    from paco_ds.planning.print_plan import as_json, print_plan
    from paco_ds.planning.remedies import find_remedies

    plan = make_plan(
        recipe,
        arguments.ranks,
        find_data(recipe.data, arguments.images, arguments.classes),
        gpu_memory=memory,
        images_per_second=arguments.images_per_second,
        device=arguments.device,
    )
    remedies = find_remedies(plan)
    ways = []
    if arguments.gpu_rate is not None:
        from paco_ds.data.manifest import open_data
        from paco_ds.planning.loading_ways import plan_ways, ways_in_words

        manifest = open_data(recipe.data, [recipe.data.train_split]) if plan.data.built else None
        gpus = 8 if arguments.gpus_per_node is None else arguments.gpus_per_node
        ways = plan_ways(
            recipe.data,
            recipe.training_views,
            manifest,
            per_gpu=arguments.gpu_rate,
            gpus=gpus,
            short=recipe.views.evaluation.resize,
        )
    if arguments.json:
        cores = {"cores_per_node": {way.name: way.cores for way in ways}} if ways else {}
        say(json.dumps(as_json(plan, remedies) | cores))
    else:
        print_plan(plan, Screen(width=arguments.width), remedies)
        if ways:
            say("\n".join(ways_in_words(ways, arguments.gpu_rate, gpus, made_up=not plan.data.built)))
    return 1 if plan.verdict == "does not fit" else 0


def _workers(arguments: argparse.Namespace) -> int:
    import torch

    from paco_ds.config.load import load_recipe
    from paco_ds.data.manifest import open_data
    from paco_ds.planning.loading import measure_loading, measure_step, plan_loading

    recipe = load_recipe(arguments.recipe, arguments.set)
    manifest = open_data(recipe.data, [recipe.data.train_split])
    gpus = torch.cuda.device_count()
    if arguments.images_per_second is not None:
        if arguments.ranks is None:
            raise UserError("--images-per-second is of the whole job: give its --ranks N as well")
        per_gpu = arguments.images_per_second / max(arguments.ranks, 1)
    elif gpus:
        per_gpu = measure_step(recipe, manifest.split(recipe.data.train_split).class_counts, torch.device("cuda"))
    else:
        raise UserError(
            "this machine has no GPU to measure: give --images-per-second X and --ranks N, as a run of the recipe "
            "has shown them (the progress line, or rate(paco_samples_total))"
        )
    plan = plan_loading(
        measure_loading(recipe.data, recipe.training_views, manifest, recipe.seed, views_on=recipe.views.device),
        per_gpu,
        gpus or 1 if arguments.gpus_per_node is None else arguments.gpus_per_node,
        recipe.data.workers,
        measured=arguments.images_per_second is None,
    )
    if arguments.json:
        say(json.dumps({**asdict(plan), "verdict": plan.verdict}))
    else:
        say("\n".join(plan.lines()))
    return 0 if plan.verdict == "fed" else 1


def _launch(arguments: argparse.Namespace) -> int:
    from paco_ds.config.load import load_recipe
    from paco_ds.planning.node_check import launch

    load_recipe(arguments.recipe, arguments.set)  # a mistake in it is reported here, once
    return launch(Path(arguments.launch), arguments.recipe, arguments.set, arguments.output, arguments.master_port)


def _views(arguments: argparse.Namespace) -> int:
    from paco_ds.config.load import load_recipe
    from paco_ds.data.manifest import open_data
    from paco_ds.report.view_sheet import draw_view_sheet

    recipe = load_recipe(arguments.recipe, arguments.set)
    manifest = open_data(recipe.data, [recipe.data.train_split])
    bad = draw_view_sheet(recipe.data, recipe.views, manifest, Path(arguments.views), seed=recipe.seed)
    for line in bad:
        say(f"left out: {line}")
    say(f"views of the training images: {arguments.views}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="plan memory, traffic and time of a run")
    parser.add_argument("--workers", action="store_true", help="measure how many loader workers feed a node's GPUs")
    parser.add_argument(
        "--launch", metavar="HOSTFILE", help="start one rank for each slot of these hosts, and check every node"
    )
    parser.add_argument("--views", metavar="SHEET.png", help="draw both views of images from the recipe's shards")
    parser.add_argument("--recipe", required=True, help="recipe, YAML: a path, or the name of a shipped one")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override a setting")
    parser.add_argument("--allow-code", action=AllowCode)
    parser.add_argument("--ranks", type=int, help="ranks of the job, over all hosts")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="for --launch; where the run will be written")
    parser.add_argument("--master-port", type=int, default=29500, help="for --launch")
    parser.add_argument(
        "--gpus-per-node", type=int, help="for --workers, those of this machine by default; for --gpu-rate, 8"
    )
    parser.add_argument(
        "--gpu-rate",
        type=float,
        metavar="X",
        help="for --plan; images/s of one GPU: also say how many cores a node needs, by each way to make views",
    )
    parser.add_argument("--gpu-memory", metavar="SIZE", help="of each GPU: 80GiB is 2^30 bytes, 80GB is 10^9")
    parser.add_argument("--images-per-second", type=float, help="of the whole job, as a run of it has shown")
    parser.add_argument("--images", type=int, help="training images, where there are no shards yet")
    parser.add_argument("--classes", type=int, help="classes, where there are no shards yet")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what the ranks run on")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of tables")
    parser.add_argument("--width", type=int, default=120, help="columns of the tables")
    return parser


if __name__ == "__main__":
    sys.exit(main())
