"""A plan as printed tables and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from paco_ds.command import Screen
from paco_ds.contrast.key_queue import short_queue_hint
from paco_ds.planning.memory import PARTS
from paco_ds.planning.network import AHEAD, few_steps_hint, link_seconds
from paco_ds.planning.plan import OUTSIDE, Plan
from paco_ds.planning.sizes import format_bytes
from paco_ds.planning.traffic import Traffic


def print_plan(plan: Plan, console: Screen, remedies: Sequence[str] = ()) -> None:
    """Print the plan; the verdict is last, with what `find_remedies` found."""
    console.print(_settings(plan))
    console.print(_memory(plan))
    console.print(_traffic(plan))
    if plan.connections:
        console.print(_network(plan))
    for line in verdict_lines(plan, remedies):
        console.print(line, highlight=False, soft_wrap=True)


def verdict_lines(plan: Plan, remedies: Sequence[str] = ()) -> list[str]:
    """The verdict and its remedies; empty if no GPU memory was given."""
    if plan.gpu_memory is None:
        return []
    needed = plan.memory[plan.stage].total
    outside = f" and {format_bytes(OUTSIDE)} outside torch" if plan.device == "cuda" else ""
    lines = [
        f"{plan.verdict.upper() if plan.verdict else ''}: stage {plan.stage} needs {format_bytes(needed)}{outside} of "
        f"{format_bytes(plan.gpu_memory)}"
    ]
    return lines + [f"  would fit: {remedy}" for remedy in remedies]


def as_json(plan: Plan, remedies: Sequence[str] = ()) -> dict[str, Any]:
    """Plain values: bytes, seconds, counts."""
    recipe, layout = plan.recipe, plan.layout
    return {
        "recipe": recipe.name,
        "ranks": layout.world_size,
        "legal_ranks": list(plan.legal_ranks),
        "micro_batch": layout.micro_batch,
        "micro_batches": layout.micro_batches,
        "accumulation": layout.accumulation,
        "global_batch": layout.global_batch,
        "peak_lr": recipe.lr,
        "lr_scale": recipe.step.lr_scale,
        "images": plan.data.images,
        "classes": len(plan.data.class_counts),
        "shards": len(plan.data.shards) if plan.data.built else None,
        "shards_per_rank": plan.shards_per_rank,
        "workers_per_rank": recipe.data.workers,
        "window_bytes": plan.window_bytes,
        "cache_bytes_per_rank": plan.cache_bytes,
        "ready_bytes": plan.ready_bytes,
        "steps_per_epoch": plan.steps_per_epoch,
        "seconds_per_epoch": plan.seconds_per_epoch,
        "device": plan.device,
        "stage": plan.stage,
        "autocast": plan.autocast,
        "activation_checkpointing": recipe.engine.activation_checkpointing,
        "memory": {
            stage: {"total": memory.total, "moment": memory.moment, "parts": memory.parts, "host": memory.host}
            for stage, memory in plan.memory.items()
        },
        "traffic": {stage: [vars(row) for row in rows] for stage, rows in plan.traffic.items()},
        "link_seconds": link_seconds(plan.traffic[plan.stage]),
        "connections": plan.connections,
        "open_files": plan.open_files,
        "few_steps": few_steps_hint(plan.steps_per_epoch, layout),
        "gpu_memory": plan.gpu_memory,
        "verdict": plan.verdict,
        "remedies": list(remedies),
    }


def _settings(plan: Plan) -> Table:
    recipe, layout, data = plan.recipe, plan.layout, plan.data
    table = Table(title=f"{recipe.name} on {layout.world_size} ranks", show_header=False, title_justify="left")
    legal = ", ".join(map(str, plan.legal_ranks))
    rows = {
        "data": f"{data.images} images of {len(data.class_counts)} classes, "
        + (f"{len(data.shards)} shards" if data.built else "as given: no shards are built"),
        "step": f"{layout.micro_batches} micro-batches of {layout.micro_batch}, {layout.accumulation} a rank: "
        f"{layout.global_batch} images",
        "legal ranks": f"{legal}; for others --set step.micro_batches=(a multiple of them)",
        "learning rate": f"peak {recipe.lr:g}"
        + (f", {recipe.step.lr_scale:g} x the recipe's: scaled, another model" if recipe.step.scale != 1 else ""),
        "shards a rank": f"at most {plan.shards_per_rank} in an epoch, in stretches of {recipe.data.window} images"
        if data.built
        else "known when shards are built",
        "workers a rank": str(recipe.data.workers) if recipe.data.workers else "none, the rank loads its images itself",
        "reading ahead": _reading_ahead(plan),
        "epoch": f"{plan.steps_per_epoch} steps" + _times(plan),
    }
    if recipe.data.cache and plan.cache_bytes is not None:
        rows["shard cache"] = f"at least {format_bytes(plan.cache_bytes)} for each rank of a host"
    if recipe.keys_from and (hint := short_queue_hint(recipe.queue.length, layout.global_batch)):
        rows["queue"] = hint
    if hint := few_steps_hint(plan.steps_per_epoch, layout):
        rows["few steps"] = hint
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _network(plan: Plan) -> Table:
    """Of the recipe's stage, by the speed of a rank's share of the network."""
    files = "" if plan.open_files is None else f"; at most {plan.open_files} shards open a rank"
    counted = ", ".join(f"{purpose} {number}" for purpose, number in plan.connections.items())
    table = Table(
        title=f"Time of a step's bytes on the link at stage {plan.stage}, ms",
        caption=f"connections: {counted}{files}",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("what")
    seconds = link_seconds(plan.traffic[plan.stage])
    for speed in seconds:
        table.add_column(f"{speed} Gbit/s", justify="right")
    for name, key in (("sent a step ahead", "ahead"), ("exposed at most, without overlap", "exposed")):
        table.add_row(name, *[f"{1000 * times[key]:.3g}" for times in seconds.values()])
    return table


def _reading_ahead(plan: Plan) -> str:
    ready = f"{format_bytes(plan.ready_bytes)} of prefetched images"
    if plan.window_bytes is None:
        return f"{ready}; windows: known when shards are built"
    slots = plan.layout.accumulation * plan.layout.micro_batch
    return (
        f"at most {format_bytes(plan.window_bytes)} of host memory a rank, for any number of workers: {slots} slots x "
        f"{plan.recipe.data.window} images and a few; {ready}"
    )


def _times(plan: Plan) -> str:
    seconds = plan.seconds_per_epoch
    if seconds is None:
        return "; give --images-per-second for its time"
    hours = seconds * plan.recipe.schedule.epochs / 3600
    return (
        f", {seconds / 60:.1f} min at {plan.images_per_second:g} images/s; "
        f"{plan.recipe.schedule.epochs} epochs {hours:.1f} h, evaluation apart"
    )


def _memory(plan: Plan) -> Table:
    held = "allocated on a GPU" if plan.device == "cuda" else "resident on a CPU rank"
    executed = "bfloat16 autocast" if plan.autocast else "float32"
    if plan.recipe.engine.activation_checkpointing:
        executed += ", activation checkpointing"
    whose = "with engine.deepspeed=auto the" if plan.recipe.engine.deepspeed == "auto" else "the recipe's"
    table = Table(
        title=f"Memory {held} at the peak of a step, by ZeRO stage",
        caption=f"{whose} stage is {plan.stage}, {executed}",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("part")
    for stage in plan.memory:
        table.add_column(f"stage {stage}", justify="right")
    for part in PARTS:
        figures = [plan.memory[stage].parts[part] for stage in plan.memory]
        if any(figures):
            table.add_row(part, *[format_bytes(f) if f else "-" for f in figures])
    table.add_section()
    table.add_row("total", *[format_bytes(plan.memory[stage].total) for stage in plan.memory])
    if any(memory.host for memory in plan.memory.values()):
        hosts = [plan.memory[stage].host for stage in plan.memory]
        table.add_row("offloaded, on the host", *[format_bytes(n) if n else "-" for n in hosts])
    table.add_row("peak during", *[plan.memory[stage].moment for stage in plan.memory])
    return table


def _traffic(plan: Plan) -> Table:
    table = Table(
        title="Bytes that a rank sends in a step, by collective and ZeRO stage",
        caption="key images: of step 0 on rank 0" if any(row.what == AHEAD for row in plan.traffic[0]) else "",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("what", "collective", "by"):
        table.add_column(column)
    for stage in plan.memory:
        table.add_column(f"stage {stage}", justify="right")
    cells: dict[tuple[str, str, str], dict[int, int]] = {}
    for stage in plan.memory:
        for row in plan.traffic[stage]:
            cells.setdefault((row.what, row.op, row.by), {})[stage] = row.bytes
    for name, by_stage in cells.items():
        table.add_row(*name, *[format_bytes(by_stage[s]) if s in by_stage else "-" for s in plan.memory])
    table.add_section()
    table.add_row("all", "", "", *[format_bytes(_sum(plan.traffic[stage])) for stage in plan.memory])
    return table


def _sum(rows: list[Traffic]) -> int:
    return sum(row.bytes for row in rows)
