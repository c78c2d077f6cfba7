"""A picture of a recipe's views: one row per training image, with the image and its views."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from paco_ds.config.data import DataSettings
from paco_ds.config.views import ViewSettings
from paco_ds.data.manifest import Manifest
from paco_ds.data.shard import BadSample, RawSample, ShardReader
from paco_ds.data.stream.decode import decode
from paco_ds.data.stream.views import MakeViews, Pixels, make_view
from paco_ds.errors import DataError
from paco_ds.randomness import DrawPurpose, generator, permutation

DRAWS = 3  # of each view
_INCHES = 1.5


def draw_view_sheet(
    data: DataSettings, views: ViewSettings, manifest: Manifest, path: Path, *, seed: int, images: int = 8
) -> list[str]:
    """Write a picture (format by the ending) of up to `images` random training images with their views.

    Args:
        seed: of the order of images and of the draws, that of the recipe.

    Returns:
        One line per bad sample.

    Raises:
        DataError: no sample can be read, or the file cannot be written.
    """
    make_views = MakeViews((make_view(views.query), make_view(views.key)), data.max_pixels)
    rows: list[tuple[str, list[Pixels]]] = []
    bad: list[str] = []
    with ShardReader(manifest.storage, manifest.split(data.train_split)) as reader:
        for sample_id in permutation(len(reader), DrawPurpose.WINDOW, seed):
            try:
                sample = reader.read(int(sample_id))
                pictures = [decode(sample, data.max_pixels), *_draws(make_views, sample, seed, int(sample_id))]
                rows.append((f"{manifest.classes[sample.label]}\n{sample.key}", pictures))
            except BadSample as sample:
                bad.append(str(sample))
            if len(rows) == images or len(bad) == _MOST_BAD:
                break
    if not rows:
        raise DataError(f"{len(bad)} samples of {data.shards} are unreadable, the first: {bad[0]}")
    _draw(rows, views, path)
    return bad


_MOST_BAD = 100


def _draws(make_views: MakeViews, sample: RawSample, seed: int, sample_id: int) -> list[Pixels]:
    """The query views of the first epochs, then their key views."""
    streams = (DrawPurpose.QUERY_VIEW, DrawPurpose.KEY_VIEW)
    pairs = [
        make_views(sample, *(generator(stream, seed, epoch, sample_id) for stream in streams)) for epoch in range(DRAWS)
    ]
    return [*(pair[0] for pair in pairs), *(pair[1] for pair in pairs)]


def _draw(rows: list[tuple[str, list[Pixels]]], views: ViewSettings, path: Path) -> None:
    columns = 1 + 2 * DRAWS
    figure = Figure(figsize=(columns * _INCHES, len(rows) * _INCHES * 1.15), layout="constrained", dpi=80)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    titles = ["", *[f"query: {views.query.name}"] * DRAWS, *[f"key: {views.key.name}"] * DRAWS]
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
