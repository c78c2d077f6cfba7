"""Networks, weights and settings that do not fit each other are refused alike by a plan and by a training's start."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from paco_ds.planning.preflight import main
from tests.models.tiny_networks import of
from tests.pool import RankError
from tests.recipes import model_of, tiny_recipe, write_tiny_recipe

CLIP_TEXT = ("loss.method=cross_entropy", "model.centers=cosine", "model.centers_from=text.safetensors")
REFUSED = {
    "an unknown argument": (of("vit", drop_pathrate=0.1), r"kwargs\.drop_pathrate is no argument .* drop_path_rate"),
    "weights of another network": (
        (*of("convnext"), "model.start_from=vit.safetensors"),
        r"start_from .*vit\.safetensors does not fit this network: .*set model\.backbone to the file's network",
    ),
    "patches that do not divide the image": (
        (*of("vit"), "views.query.size=36", "views.key.size=36"),
        r"views\.query\.size 36: the patches of timm:vit_\S+ have 8 pixels.*set 32 or 40",
    ),
    "images that pooling makes nothing of": (
        ("model.backbone=densenet121",),
        r"views\.query\.size 12: model\.backbone densenet121 makes nothing of so few pixels: raise the size",
    ),
    "layer decay without groups": (
        ("optimizer.layer_decay=0.9",),
        r"optimizer\.layer_decay 0\.9: this backbone does not say how deep its layers are: set layer_decay to 1",
    ),
    "LoRA on a CNN": (
        (*of("convnext"), "model.trained=lora", "model.start_from=vit.safetensors"),
        r"lora adds to the blocks of timm's .*convnext",
    ),
    "experts on a trunk that cannot branch": (
        (*of("eva"), "loss.method=ride", "model.experts=2", "model.centers=cosine"),
        r"model\.experts 2: timm:eva02\S+ has no stages to branch at",
    ),
    "text of another class order": (
        (*of("vit"), *CLIP_TEXT),
        r"centers_from .*text\.safetensors is of other classes than the shards: .* in another order: sort its rows",
    ),
}


@pytest.fixture(scope="module")
def files(striped_shards, tmp_path_factory):
    """A folder with weights of the tiny ViT, and embeddings whose classes are in another order."""
    folder = tmp_path_factory.mktemp("refused")
    network = model_of(tiny_recipe(*of("vit")), 4).query_encoder.backbone.network
    save_file(network.state_dict(), folder / "vit.safetensors")
    names = json.loads((striped_shards / "manifest.json").read_text())["classes"][::-1]
    save_file({"embeddings": torch.eye(4, 16)}, folder / "text.safetensors", {"class_names": json.dumps(names)})
    (folder / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    return folder


@pytest.mark.parametrize("what", REFUSED)
def test_a_plan_and_a_start_refuse_it_in_one_line(pool, striped_shards, files, capsys, what):
    """With the setting and what to do, and the same words."""
    settings, message = REFUSED[what]
    where = (f"data.shards={striped_shards}", "engine.deepspeed=zero.json", "key_encoder.batch_norm=auto")
    write_tiny_recipe(files / "tiny.yaml", *where, *settings)
    with pytest.raises(SystemExit) as stopped:
        main(["--plan", "--recipe", str(files / "tiny.yaml"), "--ranks", "1"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    with pytest.raises(RankError) as refused:
        pool(1).run("tests.distributed.training:train", recipe=files / "tiny.yaml", run=files / "run")
    (line,) = said.splitlines()
    assert line.removeprefix("error: ") in str(refused.value)
    assert re.search(message, line), line
