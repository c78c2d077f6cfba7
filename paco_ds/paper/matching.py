"""Which row of a shipped table a run trains: the one whose recipe has the run's settings."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from paco_ds.config.shipped import TABLES
from paco_ds.paper.results import JUDGED_BY, Identity
from paco_ds.paper.tables import Row, load_table

# what a run may have otherwise than the paper and still be beside it: a seed, other ranks, other names of the splits
FREE = frozenset({"seed", "step.micro_batch", "step.micro_batches", "data.train_split", *JUDGED_BY})
# key of metrics.json: option of a row's `evaluate`
CORRECTIONS = {
    "tau_normalization": "--tau-normalize",
    "logit_adjustment": "--logit-adjust",
    "aggregation": "--aggregate-experts",
}


@cache
def rows_of_the_paper() -> list[tuple[str, Row, Mapping[str, Any]]]:
    """(name of the table, row, settings) of every row of a shipped table that has the paper's figures."""
    found = []
    for path in sorted(TABLES.glob("*.yaml")):
        table = load_table(path)
        for row in table.rows:
            if row.paper is not None:
                start = (f"{row.start}=FIRST_STAGE",) if row.after else ()
                found.append((path.stem, row, Identity.of(table.resolve(row, None, start)).settings))
    return found


def matching_row(settings: Mapping[str, Any], figures: Mapping[str, Any]) -> tuple[str, Row] | None:
    """(name of the table, row) with these settings and, in its evaluation, the same corrections; None if there is none.

    Of several, such as PaCo with ResNeXt-50 in Tables 9 and 14, that with the most figures.

    Args:
        settings: of `Identity`.
        figures: metrics.json.
    """
    wanted, corrected = _fixed(settings), {option for key, option in CORRECTIONS.items() if key in figures}
    found = []
    for table, row, of_row in rows_of_the_paper():
        options = {option.partition("=")[0] for option in row.evaluate}
        if options & set(CORRECTIONS.values()) == corrected and _fixed(of_row) == wanted:
            found.append((table, row))
    return max(found, key=lambda each: len(each[1].paper.fractions() if each[1].paper else ()), default=None)


def _fixed(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in FREE}
