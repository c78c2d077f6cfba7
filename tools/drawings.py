#!/usr/bin/env python3
"""Draw the pictures of docs/concepts.md as SVG: `make pages`.

Their numbers are computed by the code that they explain. Colors are CSS variables with a light and a dark set, so that
a picture follows the reader's system; the site (tools/docs_site.py) puts it into the page, where it follows the page.
`tests/test_drawings.py` fails while a file is not what this program draws.
"""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

import numpy as np

from paco_ds.data.stream.order import EpochOrder
from paco_ds.files import replace_text

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images"
_LIGHT = "--ink:#1c2530;--soft:#5b6773;--line:#9aa5b1;--a:#cfe0ff;--b:#ffdcb0;--c:#c9ecd2;--d:#ecd3f2;--off:#eef1f4"
_DARK = "--ink:#e8ebee;--soft:#a3adb8;--line:#66717d;--a:#24437e;--b:#7a4a12;--c:#1f5a35;--d:#5b3167;--off:#262c33"
_STYLE = (
    f".drawing{{{_LIGHT};font-family:system-ui,sans-serif;font-size:13px}}"
    ".drawing text{fill:var(--ink)}.drawing .soft{fill:var(--soft)}.drawing .mid{text-anchor:middle}"
    ".drawing .bold{font-weight:600}.drawing rect,.drawing path{stroke:var(--line)}.drawing .arrow{fill:none}"
    f"@media (prefers-color-scheme:dark){{.drawing{{{_DARK}}}}}"
)


class Drawing:
    """An SVG picture of a size in pixels."""

    def __init__(self, title: str, width: int, height: int) -> None:
        self._title, self._width, self._height = title, width, height
        self._parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, fill: str, rounded: int = 4) -> None:
        """A rectangle in one of the colors a, b, c, d, off."""
        place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{rounded}"'
        self._parts.append(f'<rect {place} style="fill:var(--{fill})"/>')

    def text(self, x: float, y: float, text: object, kind: str = "") -> None:
        """A line of text from x, or around it with `mid` in `kind`."""
        self._parts.append(f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(str(text))}</text>')

    def path(self, commands: str, fill: str | None = None) -> None:
        """A shape in a color, or without one a line that ends in an arrow."""
        look = f'style="fill:var(--{fill})"' if fill else 'class="arrow" marker-end="url(#tip)"'
        self._parts.append(f'<path d="{commands}" {look}/>')

    def svg(self) -> str:
        """The file."""
        size = f'viewBox="0 0 {self._width} {self._height}" width="{self._width}" height="{self._height}"'
        tip = (
            '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
            '<path d="M0,0L8,4L0,8z" style="fill:var(--soft);stroke:none"/></marker>'
        )
        head = f'<svg xmlns="http://www.w3.org/2000/svg" class="drawing" role="img" {size}>'
        inside = [
            f"<title>{escape(self._title)}</title>",
            f"<style>{_STYLE}</style>",
            f"<defs>{tip}</defs>",
            *self._parts,
        ]
        return "\n".join([head, *inside, "</svg>\n"])


def epoch_order() -> str:
    """26 images in three shards, G = 4 and windows of 3."""
    counts, slots, window = [10, 8, 8], 4, 3
    order = EpochOrder(counts, slots, seed=2, epoch=0, window=window)
    drawing, cell, left = Drawing("The order of an epoch of 26 images in three shards", 830, 412), 26, 20
    shard_of = np.repeat(["a", "b", "c"], counts)
    rotated = order._ids(np.arange(order.samples))
    shuffled = np.roll(rotated, order._rotation)

    def row(y: float, ids: np.ndarray, gap: int) -> list[int]:
        places = [left + place * cell + place // gap * 12 for place in range(len(ids))]
        for x, sample in zip(places, ids, strict=True):
            drawing.box(x, y, cell, 24, shard_of[sample], 2)
            drawing.text(x + cell / 2, y + 17, sample, "mid")
        return places

    drawing.text(left, 20, "1  The shards in random order, their ids in a row", "bold")
    row(30, shuffled, order.samples)
    drawing.text(
        left, 90, f"2, 3  Rotated by a random offset, here {order._rotation}; cut into G = 4 batch slots", "bold"
    )
    places = row(100, rotated, order.steps)
    for slot in range(slots + 1):
        x = places[slot * order.steps]
        drawing.text(x, 142, f"batch slot {slot}" if slot < slots else "left out", "soft")
    drawing.text(left, 184, "4  Windows of a batch slot are permuted; step b takes the b-th image of each", "bold")
    ids = np.stack([order.batch(step, range(slots)) for step in range(order.steps)], axis=1)
    first = 250
    for number in range(order.steps // window):
        x = first + number * (window * 52 + 30)
        drawing.text(x, 212, f"window {number}", "soft")
        for place in range(window):
            drawing.text(x + place * 52 + 20, 232, f"step {number * window + place}", "mid soft")
    for slot in range(slots):
        y = 242 + slot * 34 + slot // 2 * 10
        rank = slot // 2
        if slot % 2 == 0:
            drawing.text(left, y + 18, f"micro-batch {rank}, rank {rank}")
        drawing.text(left + 168, y + 18, f"slot {slot}", "soft")
        for step, sample in enumerate(ids[slot]):
            x = first + step // window * (window * 52 + 30) + step % window * 52
            drawing.box(x, y, 40, 26, shard_of[sample], 2)
            drawing.text(x + 20, y + 18, sample, "mid")
    together = ", ".join(map(str, ids[:, 0]))
    drawing.path(f"M{first + 20},394V384")
    drawing.text(first + 30, 403, f"the global batch of step 0: {together}", "soft")
    return drawing.svg()


def micro_batches() -> str:
    """A step of M = 4 micro-batches on 1, 2 and 4 ranks."""
    drawing, colors = Drawing("A step of four micro-batches on one, two and four ranks", 830, 336), "abcd"
    y = 20
    for ranks in (1, 2, 4):
        drawing.text(20, y + 4, f"{ranks} rank{'s' if ranks > 1 else ''}", "bold")
        top = y
        for rank in range(ranks):
            for turn, micro_batch in enumerate(range(rank, 4, ranks)):
                drawing.box(160 + turn * 112, y - 12, 104, 24, colors[micro_batch])
                drawing.text(212 + turn * 112, y + 4, f"micro-batch {micro_batch}", "mid")
            drawing.text(100, y + 4, f"rank {rank}", "soft")
            y += 30
        middle = (top + y - 30) / 2
        drawing.path(f"M{160 + 4 // ranks * 112 + 4},{middle:g}H620")
        y += 26
    drawing.box(628, 8, 186, 252, "off")
    for line, text in enumerate(
        ("mean of the gradients", "of M micro-batches", "one update of weights", "G keys into the queue")
    ):
        drawing.text(721, 96 + line * 26, text, "mid")
    drawing.text(
        20,
        292,
        "A micro-batch is the scope of BatchNorm and of in-batch contrasts, whoever runs it: the step is the same",
    )
    drawing.text(20, 312, "on any number of ranks that divides M. Rank j mod W runs micro-batch j.")
    return drawing.svg()


def queue() -> str:
    """A ring of K = 16 slots after 3 and after 6 steps of G = 4 keys."""
    drawing = Drawing("The queue as a ring of 16 slots, after three and after six steps", 830, 360)
    length, batch = 16, 4
    for center, pushed in ((170, 12), (480, 24)):
        drawing.text(center, 178, f"{pushed} keys", "mid bold")
        drawing.text(center, 198, f"after step {pushed // batch}", "mid soft")
        for slot in range(length):
            newest = (pushed - 1 - slot) // length * length + slot  # the newest key that lies in this slot
            fill = "off" if newest < 0 else "b" if newest >= pushed - batch else "a"
            drawing.path(_wedge(center, 184, 82, 142, slot, length), fill)
            x, y = _on_ring(center, 184, 112, slot + 0.5, length)
            if newest >= 0:
                drawing.text(x, y + 5, f"{newest}", "mid")
            x, y = _on_ring(center, 184, 155, slot + 0.5, length)
            drawing.text(x, y + 5, slot, "mid soft")
    for line, (fill, text) in enumerate((("b", "keys of this step"), ("a", "older keys"), ("off", "never filled"))):
        drawing.box(652, 92 + line * 30, 18, 18, fill, 2)
        drawing.text(678, 106 + line * 30, text)
    for line, text in enumerate(
        ("Key n is in slot n mod K.", "Every rank holds all", "of it. What was never", "filled is not in the loss.")
    ):
        drawing.text(652, 206 + line * 20, text, "soft")
    return drawing.svg()


def _on_ring(x: float, y: float, radius: float, slot: float, length: int) -> tuple[float, float]:
    angle = 2 * math.pi * slot / length - math.pi / 2
    return x + radius * math.cos(angle), y + radius * math.sin(angle)


def _wedge(x: float, y: float, inner: float, outer: float, slot: int, length: int) -> str:
    """Commands of the path of a slot's part of the ring."""
    (ax, ay), (bx, by) = (_on_ring(x, y, outer, slot + step, length) for step in (0, 1))
    (cx, cy), (dx, dy) = (_on_ring(x, y, inner, slot + step, length) for step in (1, 0))
    return (
        f"M{ax:.1f},{ay:.1f}A{outer:g},{outer:g} 0 0 1 {bx:.1f},{by:.1f}"
        f"L{cx:.1f},{cy:.1f}A{inner:g},{inner:g} 0 0 0 {dx:.1f},{dy:.1f}z"
    )


def checkpoint() -> str:
    """What is in a checkpoint, and what is computed from the step."""
    files = (
        (
            "model.safetensors",
            "a",
            ("query encoder, centers", "key encoder", "running statistics", "average (ema), if any"),
        ),
        ("optimizer.safetensors", "b", ("states of the optimizer", "number of steps")),
        ("queue.safetensors", "c", ("keys, labels", "keys pushed so far")),
        ("state.json", "d", ("step", "resume identity", "digest of the shards", "SHA-256 of the files")),
    )
    drawing = Drawing("What a checkpoint holds, and what is computed from the step", 830, 352)
    drawing.text(20, 26, "RUN/checkpoints/step-00004200/", "bold")
    for number, (name, fill, parts) in enumerate(files):
        x = 20 + number * 200
        drawing.box(x, 40, 188, 150, fill, 6)
        drawing.text(x + 10, 64, name, "bold")
        for line, part in enumerate(parts):
            drawing.text(x + 10, 92 + line * 22, part)
    drawing.text(
        20,
        212,
        "float32, whole tensors: any number of ranks and any ZeRO stage reads them, without DeepSpeed or pickle",
        "soft",
    )
    drawing.text(20, 252, "Not stored, since it is a function of the step and the seed", "bold")
    computed = ("order of the images", "views of each image", "learning rate", "key momentum", "groups of ShuffleBN")
    for number, text in enumerate(computed):
        drawing.box(20 + number * 160, 266, 148, 34, "off", 6)
        drawing.text(94 + number * 160, 288, text, "mid")
    drawing.text(
        20,
        328,
        "So a resumed run takes the same steps as one that never stopped, also in the middle of an epoch.",
        "soft",
    )
    return drawing.svg()


def drawings() -> dict[Path, str]:
    """{file: what belongs in it}."""
    drawn = {"epoch-order": epoch_order, "micro-batches": micro_batches, "queue": queue, "checkpoint": checkpoint}
    return {FOLDER / f"{name}.svg": draw() for name, draw in drawn.items()}


if __name__ == "__main__":
    for file, content in drawings().items():
        replace_text(file, content)
