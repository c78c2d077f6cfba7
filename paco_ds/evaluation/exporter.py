"""A trained model in the formats of other programs, each checked against ours before it is kept.

Shapes: N images, C classes, S the side of an image.
"""

from __future__ import annotations

import copy
import importlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import load, save
from torch import Tensor, nn

from paco_ds.errors import UserError
from paco_ds.evaluation.hub_folder import channels, write_hub_folder
from paco_ds.evaluation.predictor import Predictor
from paco_ds.files import fsync, storage_errors, whole_file
from paco_ds.models.adapters import is_added, merged
from paco_ds.models.experts import Experts
from paco_ds.models.output import ModelOutput
from paco_ds.models.recogniser import Recogniser

TOLERANCE = 1e-5
"""Of logits, absolute and relative: that of a written model beside ours, in float32."""
_CHECKED = 3  # random images; another number than the one exported with shows that the batch is free


def export(model: Predictor, to: str, output: Path, run: Path | None = None) -> None:
    """Write a model in one of `FORMATS`, whole or not at all; LoRA's updates inside the weights of their layers.

    Args:
        run: whose `metrics.json` the model card of `hf` is made from.

    Raises:
        UserError: the format cannot hold this model, or a package is missing; the message names it.
        AssertionError: what was written does not answer as the model.
    """
    if model.recogniser.routers is not None:
        raise UserError(
            f"--to {to} has no place for routers, which ask one expert after another by what they see: export the run "
            "of the first stage, model.start_from, which asks all"
        )
    write = {
        "safetensors": _safetensors,
        "torchvision": _torchvision,
        "timm": _timm,
        "onnx": _onnx,
        "torch-export": _torch_export,
        "hf": _hub_folder,
    }[to]
    write(_merged(model), output, run)


def _merged(model: Predictor) -> Predictor:
    """The model without layers of LoRA, which answers the same."""
    recogniser = merged(model.recogniser)
    if recogniser is model.recogniser:
        return model
    images, expected = _checked_images(model)
    model = copy.copy(model)
    model.recogniser = recogniser
    with torch.no_grad():
        torch.testing.assert_close(answers(model)(images), expected, rtol=TOLERANCE, atol=TOLERANCE)
    return model


class _Answers(nn.Module):
    def __init__(self, model: Recogniser) -> None:
        super().__init__()
        self.normalize, self.backbone, self.centers = model.normalize, model.query_encoder.backbone, model.centers

    def forward(self, images: Tensor) -> Tensor:
        feature = self.backbone(self.normalize(images))
        return ModelOutput(feature, self.centers(feature)).mean_logits()


def answers(model: Predictor) -> nn.Module:
    """The model as one module: uint8 RGB images [N, 3, S, S], as the view of evaluations gives them, to logits [N, C].

    Of experts the mean of their logits, in float32.
    """
    return _Answers(model.recogniser).eval()


def _safetensors(model: Predictor, output: Path, run: Path | None) -> None:
    """Tensors of `answers`, with class names and the view as metadata."""
    tensors = {name: tensor.contiguous() for name, tensor in answers(model).state_dict().items()}
    content = save(tensors, {key: json.dumps(value) for key, value in _about(model).items()})
    for name, tensor in load(content).items():
        torch.testing.assert_close(tensor, tensors[name], rtol=0, atol=0)
    with whole_file(output) as file:
        file.write(content)


def _torchvision(model: Predictor, output: Path, run: Path | None) -> None:
    """A state dict that torchvision's own model of C classes loads with `strict`."""
    name = model.backbone
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise UserError(f"--to torchvision: {name} is no network of torchvision's; give --to onnx or safetensors")
    theirs = torchvision.models.get_model(name, weights=None, num_classes=len(model.class_names), **_arguments(model))
    tensors = _with_classifier(model, theirs, "torchvision")
    _require_equal(model, theirs)
    with whole_file(output) as file:
        torch.save(tensors, file)


def _timm(model: Predictor, output: Path, run: Path | None) -> None:
    """A safetensors file for `timm.create_model(NAME, num_classes=C, checkpoint_path=FILE, **ARGS)`; ARGS, such as
    img_size of a ViT, are JSON in its metadata under `model_args`."""
    tensors = _timm_tensors(model, "timm")
    with whole_file(output) as file:
        file.write(save(tensors, {"architecture": _timm_name(model), "model_args": json.dumps(_arguments(model))}))


def _timm_tensors(model: Predictor, to: str) -> dict[str, Tensor]:
    timm = _needed("timm", "timm")
    name = _timm_name(model)
    if name not in timm.list_models():
        raise UserError(f"--to {to}: {model.backbone} is no network of timm's; give --to onnx or safetensors")
    theirs = timm.create_model(name, pretrained=False, num_classes=len(model.class_names), **_arguments(model))
    tensors = _with_classifier(model, theirs, to)
    _require_equal(model, theirs)
    return tensors


def _arguments(model: Predictor) -> dict[str, Any]:
    """With which another library builds this network, beside the number of classes."""
    return model.recogniser.query_encoder.backbone.arguments


def _timm_name(model: Predictor) -> str:
    return model.backbone.removeprefix("timm:")


def _with_classifier(model: Predictor, theirs: nn.Module, to: str) -> dict[str, Tensor]:
    """The backbone's tensors and the centers as the classifier of another library's network, which then has them.

    Raises:
        UserError: experts or cosine centers, for which that network has no place, or other names.
    """
    ours = model.recogniser
    if isinstance(ours.query_encoder.backbone.network, Experts):
        raise UserError(f"--to {to} has no place for experts: give --to onnx, torch-export or safetensors")
    if not isinstance(ours.centers, nn.Linear):
        raise UserError(
            f"--to {to}: its classifier is linear, and these are {type(ours.centers).__name__}: give --to onnx, "
            "torch-export or safetensors"
        )
    if any(is_added(name) for name in ours.query_encoder.backbone.state_dict()):
        raise UserError(
            f"--to {to} has no place for the bottlenecks of model.trained adaptformer: give --to onnx, torch-export or "
            "safetensors"
        )
    tensors = {name: t.contiguous() for name, t in ours.query_encoder.backbone.network.state_dict().items()}
    missing = sorted(theirs.state_dict().keys() - tensors.keys())
    head = {name.rpartition(".")[0] for name in missing}
    if len(head) != 1 or not isinstance(theirs.get_submodule(next(iter(head))), nn.Linear):
        raise UserError(f"--to {to}: its {model.backbone} has tensors that ours has not, such as {missing[:1]}")
    classifier = head.pop()
    bias = ours.centers.bias if ours.centers.bias is not None else torch.zeros(len(model.class_names))
    tensors |= {f"{classifier}.weight": ours.centers.weight.detach(), f"{classifier}.bias": bias.detach()}
    try:
        theirs.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise UserError(
            f"--to {to}: its {model.backbone} has other tensors: {str(error).splitlines()[-1].strip()}"
        ) from None
    return {name: tensors[name] for name in theirs.state_dict()}


def _require_equal(model: Predictor, theirs: nn.Module) -> None:
    """AssertionError unless another library's network, given normalised images, answers as the model."""
    images, expected = _checked_images(model)
    with torch.no_grad():
        got = theirs.eval()(model.recogniser.normalize(images))
    torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


def _checked_images(model: Predictor) -> tuple[Tensor, Tensor]:
    """(random images, our logits for them)."""
    generator = torch.Generator().manual_seed(0)
    shape = (_CHECKED, 3, model.view.size, model.view.size)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        return images, answers(model)(images)


def _traceable(model: Predictor) -> tuple[nn.Module, Tensor, Any]:
    """(module, an example of two images, which dimension is free)."""
    return answers(model), _checked_images(model)[0][:2], {0: torch.export.Dim("batch", min=1)}


def _torch_export(model: Predictor, output: Path, run: Path | None) -> None:
    """A program for `torch.export.load(FILE).module()`, of any number of images."""
    if output.suffix != ".pt2":
        raise UserError(f"--to torch-export: torch reads programs from files that end in .pt2: --output {output}.pt2")
    module, example, free = _traceable(model)
    program = torch.export.export(module, (example,), dynamic_shapes=(free,))
    with _beside(output) as part:
        torch.export.save(program, part)
        images, expected = _checked_images(model)
        got = torch.export.load(part).module()(images)
        torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


def _onnx(model: Predictor, output: Path, run: Path | None) -> None:
    """An ONNX file: `images` uint8 [N, 3, S, S] to `logits` float32 [N, C], with class names as metadata."""
    onnx, _, onnxruntime = (_needed(package, "onnx") for package in ("onnx", "onnxscript", "onnxruntime"))
    module, example, free = _traceable(model)
    with _beside(output) as part:
        torch.onnx.export(
            module,
            (example,),
            part,
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=(free,),
            external_data=False,
            verbose=False,
        )
        written = onnx.load(part)
        for key, value in _about(model).items():
            written.metadata_props.add(key=key, value=json.dumps(value))
        onnx.save(written, part)
        session = onnxruntime.InferenceSession(part, providers=["CPUExecutionProvider"])
        images, expected = _checked_images(model)
        (got,) = session.run(["logits"], {"images": images.numpy()})
        # another library sums in another order
        torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-4)


def _hub_folder(model: Predictor, output: Path, run: Path | None) -> None:
    """A folder as on the HuggingFace hub, see `hub_folder`."""
    tensors = _timm_tensors(model, "hf")
    with _beside(output, folder=True) as part:
        write_hub_folder(model, tensors, _timm_name(model), Path(part), run)


def _about(model: Predictor) -> dict[str, Any]:
    """What a program needs beside the weights."""
    return {
        "class_names": list(model.class_names),
        "backbone": model.backbone,
        "resize": model.view.resize,
        "interpolation": model.view.interpolation,
        "size": model.view.size,
        "mean": channels(model, "mean"),
        "std": channels(model, "std"),
        **({"background": model.background} if model.background else {}),
    }


@contextmanager
def _beside(output: Path, folder: bool = False) -> Iterator[str]:
    """A file or folder beside the output, which takes its name at the end; removed after an error."""
    with storage_errors(output), ExitStack() as stack:
        output.parent.mkdir(parents=True, exist_ok=True)
        place = stack.enter_context(tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-"))
        part = Path(place, f"part{output.suffix}")
        if folder:
            part.mkdir()
        yield str(part)
        for file in part.iterdir() if folder else [part]:
            fsync(file)
        shutil.move(part, output)


def _needed(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"this needs the package {package}: pip install 'paco_ds[{extra}]'") from None
