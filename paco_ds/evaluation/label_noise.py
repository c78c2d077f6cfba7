"""Finds images whose nearest neighbours are mostly of another class: candidates of wrong labels.

Exact copies (same SHA-256) with the same label are one image. Of an image i with label y, let m be the number of other
images of y and k_i = min(k, m), so that a class smaller than k is not blamed for its size. Its score is 1 minus the
share of y among its k_i nearest neighbours by cosine similarity, copies left out, each weighted by its similarity (0
where negative). It is a candidate if the score is above 1/2, or if a copy has another label. Of an image without others
of its class nothing can be said.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from paco_ds.evaluation.embeddings import Embeddings, nearest


@dataclass(frozen=True)
class Candidate:
    """An image whose label may be wrong; images are numbered as in the table.

    Attributes:
        neighbour: its nearest one of `suggested`.
        similarity: of the two, cosine.
        margin: `similarity` minus that of the nearest neighbour of its own label, or of the last of the k_i nearest if
            none of them is of that label: at least so much closer is the other class.
        suggested: label with the greatest weight among the neighbours of other labels, or that of a copy.
        class_size: images with its label in the table.
        copies: labels of exact copies (same SHA-256), sorted.
    """

    image: int
    label: str
    score: float
    suggested: str
    neighbour: int
    similarity: float
    margin: float
    class_size: int
    copies: tuple[str, ...]


@dataclass(frozen=True)
class Candidates:
    """Candidates, smallest class first, then by score and margin; how many images were judged, and how many not, copies
    with the same label counted once in `found`, `judged` and `alone`."""

    found: list[Candidate]
    judged: int
    alone: int
    unlabelled: int


def wrong_labels(table: Embeddings, k: int) -> Candidates:
    """Candidates among the labelled images; see above. Images without a label neither are judged nor judge."""
    copies: dict[str, list[int]] = {}
    pictures: dict[tuple[str, str], int] = {}  # the first row of each picture with each label
    labelled = [(row, label) for row, label in enumerate(table.labels) if label is not None]
    for row, label in labelled:
        copies.setdefault(table.sha256[row], []).append(row)
        pictures.setdefault((table.sha256[row], label), row)
    rows, labels, digests = list(pictures.values()), [y for _, y in pictures], [digest for digest, _ in pictures]
    sizes, distinct = Counter(label for _, label in labelled), Counter(labels)
    most_labels = max(Counter(digests).values(), default=0)  # of a picture: so many of the nearest may be left out
    features = table.features[rows]
    found, alone = [], 0
    for i, (near, similarities) in enumerate(nearest(features, features, k + most_labels)):
        same = [row for row in copies[digests[i]] if row != rows[i]]
        of_copies = tuple(sorted(str(table.labels[row]) for row in same))
        pairs = [(int(j), float(s)) for j, s in zip(near, similarities, strict=True) if digests[j] != digests[i]]
        pairs = pairs[: min(k, distinct[labels[i]] - 1)]
        conflict = next((row for row in same if table.labels[row] != labels[i]), None)
        alone += not pairs and conflict is None
        score, weights = _score(labels[i], [labels[j] for j, _ in pairs], [s for _, s in pairs])
        if conflict is not None:
            suggested, neighbour, similarity = str(table.labels[conflict]), conflict, 1.0
        elif score > 0.5:
            suggested = max(weights, key=lambda name: weights[name])
            neighbour, similarity = next((rows[j], s) for j, s in pairs if labels[j] == suggested)
        else:
            continue
        own = next((s for j, s in pairs if labels[j] == labels[i]), pairs[-1][1] if pairs else 0.0)
        size = sizes[labels[i]]
        found.append(
            Candidate(rows[i], labels[i], score, suggested, neighbour, similarity, similarity - own, size, of_copies)
        )
    found.sort(key=lambda each: (each.class_size, each.label, -round(each.score, 6), -each.margin, each.image))
    return Candidates(found, len(rows) - alone, alone, len(table.names) - len(labelled))


def _score(own: str, labels: list[str], similarities: list[float]) -> tuple[float, dict[str, float]]:
    """(score, weights of other labels, in the order of the nearest of each)."""
    weights: dict[str, float] = {}
    for label, weight in zip(labels, np.maximum(similarities, 0).tolist(), strict=True):
        weights[label] = weights.get(label, 0.0) + weight
    total = sum(weights.values())
    share = weights.pop(own, 0.0) / total if total > 0 else 1.0  # no neighbour is similar: nothing speaks against it
    return 1 - share, weights
