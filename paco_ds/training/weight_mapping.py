"""Foreign weights into a backbone: read as its library reads them, and told apart from those of another network.

Share: of the backbone's weights those that a file has, or of the file's those that the backbone takes, whichever is
less; weights are counted by their numbers. What a file has for parts that the network has not, as a text tower or a
decoder, does not count, nor does its classifier.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paco_ds.config.parse import one_line
from paco_ds.errors import RecipeError
from paco_ds.models.backbones import Backbone
from paco_ds.models.experts import FirstStages, whole_name

# Of the parts of a file that may hold the backbone, without `module.`: of PaCo, MoCo v3, our own exports, DINO and
# segmentation and detection code. timm itself knows the image towers of CLIP, OpenCLIP and SigLIP.
_PREFIXES = ("", "encoder_q.", "base_encoder.", "backbone.network.", "backbone.", "encoder.", "model.", "trunk.")
_CLASSIFIERS = {"fc", "classifier", "heads", "head", "head_dist", "last_linear"}  # what libraries call theirs
_LISTED = 5  # names in a message


@dataclass(frozen=True)
class Fit:
    """What became of the tensors of a file, by the network's names.

    Attributes:
        taken: tensors taken over.
        share: see above.
        missing: of the network, not in the file.
        unused: of the file, without a place in the network; its classifier left out.
        reshaped: in both, of other shapes; not taken over.
        classifier: of the file, left out.
    """

    taken: int
    share: float
    missing: list[str]
    unused: list[str]
    reshaped: list[str]
    classifier: list[str]

    def lists(self) -> dict[str, Any]:
        """All names, for a file."""
        return {
            "taken": self.taken,
            "share": round(self.share, 6),
            "not in the file, drawn from the seed": self.missing,
            "not used": self.unused,
            "of another shape, drawn from the seed": self.reshaped,
            "classifier, left out": self.classifier,
        }

    def in_words(self) -> str:
        """One line: how much was taken over, and the first names of what was not."""
        parts = [f"{self.taken} tensors, {100 * self.share:.1f} % of the weights"]
        for what, names in (("not in the file", self.missing), ("not used", self.unused)):
            parts += [f"{len(names)} {what} ({_some(names)})"] * bool(names)
        parts += [f"{len(self.reshaped)} of another shape ({_some(self.reshaped)})"] * bool(self.reshaped)
        return "; ".join(parts)


def fill_backbone(
    backbone: Backbone, whole: nn.Module, tensors: Mapping[str, Tensor], least_share: float, where: str
) -> Fit:
    """Put the tensors of a file into a backbone, in place.

    Raises:
        RecipeError: as `fit_backbone`, whose arguments these are.
    """
    fit, best = fit_backbone(backbone, whole, tensors, least_share, where)
    state = whole.state_dict()
    taken = {n: t for n, t in best.items() if n in state and t.shape == state[n].shape}
    own = backbone.network.state_dict()
    if whole is backbone.network:
        backbone.network.load_state_dict({**own, **taken})
    else:
        backbone.network.load_state_dict({n: taken.get(whole_name(n), t) for n, t in own.items()})
    return fit


def fit_backbone(
    backbone: Backbone, whole: nn.Module, tensors: Mapping[str, Tensor], least_share: float, where: str
) -> tuple[Fit, Mapping[str, Tensor]]:
    """(what becomes of the tensors of a file, those that fit best by the network's names). The backbone's own weights
    are not looked at, and may be on the meta device.

    Args:
        whole: the backbone's network, or of experts that were cut from one a whole network of the same settings.
        least_share: `model.start_from_min_share`.
        where: begins the message of an error.

    Raises:
        RecipeError: the share is less.
    """
    state = whole.state_dict()
    best, errors = _best(tensors, whole, backbone, state)
    fit = _fit(best, state)
    if fit.share < least_share:
        raise RecipeError(_another_network(fit, best, state, tensors, least_share, where, errors))
    return fit, best


def needs_whole(backbone: Backbone) -> bool:
    """Whether the backbone's network was cut into experts that keep the names of the whole."""
    return any(isinstance(m, FirstStages) for m in backbone.network.children())


def _best(
    tensors: Mapping[str, Tensor], whole: nn.Module, backbone: Backbone, state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """(the part of the file that fits best, by the network's names; what the library said of parts it cannot read)."""
    best: dict[str, Tensor] = {}
    most, errors = -1, []
    for part in _parts(tensors):
        try:
            adapt = backbone.family.adapt if backbone.family else None
            adapted = dict(adapt(dict(part), whole)) if adapt else part
        except Exception as error:  # a library's own reading of a file of something else fails anywhere
            errors.append(one_line(error) or repr(error))
            continue
        fitting = sum(t.numel() for n, t in adapted.items() if n in state and t.shape == state[n].shape)
        if fitting > most:
            best, most = adapted, fitting
    return best, errors


def _parts(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    for prefix in _PREFIXES:
        part = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        if part:
            yield part
            if "mask_token" in part:  # MAE's with decoder, which timm takes for DINOv2's
                yield {name: t for name, t in part.items() if name != "mask_token"}


def _fit(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Fit:
    reshaped = sorted(n for n, t in tensors.items() if n in state and t.shape != state[n].shape)
    surplus = sorted(tensors.keys() - state.keys())
    classifier = [name for name in surplus if name.partition(".")[0] in _CLASSIFIERS]
    parts = {name.partition(".")[0] for name in state}
    theirs = {n: t for n, t in tensors.items() if n.partition(".")[0] in parts and n not in classifier}
    taken = [name for name in tensors if name in state and name not in set(reshaped)]
    found = _numbers(state[name] for name in taken)
    share = min(found / max(1, _numbers(state.values())), found / max(1, _numbers(theirs.values())))
    unused = [name for name in surplus if name not in set(classifier)]
    return Fit(len(taken), share, sorted(state.keys() - tensors.keys()), unused, reshaped, classifier)


def _numbers(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() for t in tensors if torch.is_floating_point(t))


def _another_network(
    fit: Fit,
    best: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    least_share: float,
    where: str,
    errors: list[str],
) -> str:
    problems = [
        *([f"{len(fit.missing)} tensors are missing, {fit.missing[0]} among them"] if fit.missing else []),
        *([f"{len(fit.unused)} have no place here, {fit.unused[0]} among them"] if fit.unused else []),
        *(f"{name} is {tuple(best[name].shape)}, not {tuple(state[name].shape)}" for name in fit.reshaped[:1]),
    ]
    has = "" if fit.taken or fit.reshaped else f"; the file has {_some(sorted(tensors))}"
    read = f" ({errors[0]})" if errors and not fit.taken else ""
    return (
        f"{where} does not fit this network: {'; '.join(problems)}{has}{read}. {100 * fit.share:.1f} % of the weights "
        f"fit, and model.start_from_min_share is {100 * least_share:g} %: set model.backbone to the file's network"
    )


def _some(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
