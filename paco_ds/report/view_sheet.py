"""A picture of a recipe's views: one row per training image, with the image and its views."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from paco_ds.config.recipe import Recipe
from paco_ds.data.manifest import Manifest
from paco_ds.data.shard import BadSample, ShardReader
from paco_ds.data.stream.decode import decode
from paco_ds.data.stream.views import MakeViews, Pixels, make_view
from paco_ds.errors import DataError
from paco_ds.randomness import DrawPurpose, generator, permutation

DRAWS = 3  # of each view
_INCHES = 1.5


def draw_view_sheet(recipe: Recipe, manifest: Manifest, path: Path, images: int = 8) -> list[str]:
    """Write a picture (format by the ending) of up to `images` random training images with their views.

    Returns:
        One line per bad sample.

    Raises:
        DataError: no sample can be read, or the file cannot be written.
    """
    rows: list[tuple[str, list[Pixels]]] = []
    bad: list[str] = []
    with ShardReader(manifest.storage, manifest.split(recipe.data.train_split)) as reader:
        for sample_id in permutation(len(reader), DrawPurpose.WINDOW, recipe.seed):
            try:
                rows.append(_row(recipe, manifest, reader, int(sample_id)))
            except BadSample as sample:
                bad.append(str(sample))
            if len(rows) == images or len(bad) == _MOST_BAD:
                break
    if not rows:
        raise DataError(f"{len(bad)} samples of {recipe.data.shards} are unreadable, the first: {bad[0]}")
    _draw(rows, recipe, path)
    return bad


_MOST_BAD = 100


def _row(recipe: Recipe, manifest: Manifest, reader: ShardReader, sample_id: int) -> tuple[str, list[Pixels]]:
    sample = reader.read(sample_id)
    make_views = MakeViews((make_view(recipe.views.query), make_view(recipe.views.key)), recipe.data.max_pixels)
    streams = (DrawPurpose.QUERY_VIEW, DrawPurpose.KEY_VIEW)
    pairs = [
        make_views(sample, *(generator(stream, recipe.seed, epoch, sample_id) for stream in streams))
        for epoch in range(DRAWS)
    ]
    pictures = [decode(sample, recipe.data.max_pixels), *(pair[0] for pair in pairs), *(pair[1] for pair in pairs)]
    return f"{manifest.classes[sample.label]}\n{sample.key}", pictures


def _draw(rows: list[tuple[str, list[Pixels]]], recipe: Recipe, path: Path) -> None:
    columns = 1 + 2 * DRAWS
    figure = Figure(figsize=(columns * _INCHES, len(rows) * _INCHES * 1.15), layout="constrained", dpi=80)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    titles = ["", *[f"query: {recipe.views.query.name}"] * DRAWS, *[f"key: {recipe.views.key.name}"] * DRAWS]
    for number, (name, pictures) in enumerate(rows):
        for axes, picture, title in zip(grid[number], pictures, titles, strict=True):
            axes.imshow(picture, interpolation="nearest" if max(picture.shape) < 64 else "antialiased")
            axes.set_axis_off()
            if number == 0:
                axes.set_title(title, fontsize=8)
        grid[number][0].set_title(name, fontsize=7, parse_math=False, loc="left")  # names may hold a $
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:  # ValueError: an ending that is no format of pictures
        raise DataError(f"{path} cannot be written: {error}") from None
