"""A table of embedded images, FILE.npz or FILE.parquet, and its exact nearest neighbours by cosine similarity.

Shapes: N images, F the width of the features, Q queries, k neighbours.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from paco_ds.errors import UserError
from paco_ds.evaluation.image_job import pyarrow
from paco_ds.files import whole_file

FORMATS = (".npz", ".parquet")
FORMAT = "paco_ds embeddings"
_CHUNK = 2**25  # similarities of a chunk of queries, 128 MiB in float32
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Embeddings:
    """Embedded images.

    Attributes:
        names, predicted, probabilities, sha256: of each image: its name, the most probable class and its probability,
            the digest of its file.
        labels: name of its class; None where it is not known.
        features: float32 [N, F], before the classifier, not normalised.
        weights: SHA-256 of the weights that made them.
        images, split: what the command was given, so that pictures are found again.
    """

    names: Sequence[str]
    labels: Sequence[str | None]
    predicted: Sequence[str]
    probabilities: Sequence[float]
    sha256: Sequence[str]
    features: Floats
    weights: str
    images: Sequence[str]
    split: str | None

    def save(self, path: Path) -> None:
        """Write the table whole or not at all.

        Raises:
            StorageError: it cannot be written.
            UserError: Parquet without pyarrow.
        """
        about = {"format": FORMAT, "weights": self.weights, "images": list(self.images), "split": self.split}
        columns: dict[str, Any] = {
            "name": [_utf8(name) for name in self.names],
            "label": [None if label is None else _utf8(label) for label in self.labels],
            "predicted": [_utf8(name) for name in self.predicted],
            "probability": self.probabilities,
            "sha256": self.sha256,
        }
        with whole_file(path) as file:
            if path.suffix == ".npz":
                known = np.array([label is not None for label in self.labels], bool)
                columns["label"] = [label or "" for label in columns["label"]]
                texts = {
                    key: np.array(values, None if key == "probability" else str) for key, values in columns.items()
                }
                about_file = np.array(json.dumps(about))
                np.savez(file, allow_pickle=False, about=about_file, labelled=known, features=self.features, **texts)
                return
            arrow = pyarrow()
            features = arrow.FixedSizeListArray.from_arrays(self.features.ravel(), self.features.shape[1])
            kinds = {"probability": arrow.float32()}
            arrays = {key: arrow.array(values, kinds.get(key, arrow.string())) for key, values in columns.items()}
            table = arrow.table({**arrays, "features": features})
            pyarrow(".parquet").write_table(table.replace_schema_metadata({"paco_ds": json.dumps(about)}), file)


def _utf8(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def load_embeddings(path: Path) -> Embeddings:
    """Read what `save` wrote; nothing in it is executed.

    Raises:
        UserError: it is not there, or no file of paco-embed.
    """
    made = "make one with paco-embed RUN IMAGES --output FILE.npz"
    if not path.is_file():
        raise UserError(f"{path} is not there: {made}")
    try:
        table = _read_parquet(path) if path.suffix == ".parquet" else _read_npz(path)
        about = json.loads(table.pop("about"))
        if about["format"] != FORMAT:
            raise ValueError(about["format"])
        loaded = Embeddings(**table, weights=about["weights"], images=about["images"], split=about["split"])
        features = loaded.features
        if features.dtype != np.float32 or features.ndim != 2 or not np.isfinite(features).all():
            raise ValueError("features")
        columns = (loaded.names, loaded.labels, loaded.predicted, loaded.probabilities, loaded.sha256)
        if any(len(column) != len(features) for column in columns):
            raise ValueError("columns of several lengths")
    except UserError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        zipfile.BadZipFile,
    ) as error:  # pyarrow's are ValueError
        raise UserError(f"{path} is no file of embeddings, or damaged ({type(error).__name__}): {made}") from None
    return loaded


def _read_npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        labelled = zip(file["label"].tolist(), file["labelled"].tolist(), strict=True)
        return {
            "about": str(file["about"]),
            "names": file["name"].tolist(),
            "labels": [label if known else None for label, known in labelled],
            "predicted": file["predicted"].tolist(),
            "probabilities": file["probability"].tolist(),
            "sha256": file["sha256"].tolist(),
            "features": file["features"],
        }


def _read_parquet(path: Path) -> dict[str, Any]:
    table = pyarrow(".parquet").read_table(path)
    features = table["features"].combine_chunks()
    plural = {"names": "name", "labels": "label", "predicted": "predicted", "probabilities": "probability"}
    return {
        "about": (table.schema.metadata or {})[b"paco_ds"],
        **{key: table[name].to_pylist() for key, name in plural.items()},
        "sha256": table["sha256"].to_pylist(),
        "features": features.flatten().to_numpy().reshape(len(features), -1),
    }


def unit(features: Floats) -> Floats:
    """The rows with length 1; a row of zeros stays, and is similar to none."""
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return (features / np.where(length > 0, length, 1)).astype(np.float32, copy=False)


def nearest(queries_QF: Floats, features_NF: Floats, k: int) -> Iterator[tuple[npt.NDArray[np.int64], Floats]]:
    """Of each query, in order: (indices [k], cosine similarities [k]) of the nearest rows, the nearest first.

    All N rows where there are fewer than k. Similarities are rounded to 6 decimals, and equal ones ordered by index, so
    that the order of copies does not depend on how a matrix product of some chunk rounds. Memory is bounded by a chunk
    of similarities, whatever Q is.
    """
    queries_QF, features_NF = unit(queries_QF), unit(features_NF)
    k = min(k, len(features_NF))
    chunk = max(1, _CHUNK // max(1, len(features_NF)))
    for first in range(0, len(queries_QF), chunk):
        for row_N in np.round(queries_QF[first : first + chunk] @ features_NF.T, 6):
            least = np.partition(row_N, len(row_N) - k)[len(row_N) - k] if k else np.inf
            found = np.flatnonzero(row_N >= least)  # ascending; with all ties of the last
            found = found[np.argsort(-row_N[found], kind="stable")][:k]
            yield found, row_N[found]
