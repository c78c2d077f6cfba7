"""What a run says before its first step, word by word."""

from pathlib import Path

from paco_ds.distributed.ranks import MicroBatchLayout
from paco_ds.training.opening import Opening
from paco_ds.training.weight_mapping import Fit
from tests.recipes import tiny_recipe

RUN = Path("runs/a")


def said(*overrides, **given):
    """By a run of the tiny recipe on the first of two ranks."""
    decided = ("engine.precision=float32", "engine.tf32=false", "engine.channels_last=false")
    recipe = tiny_recipe(*decided, *overrides)
    layout = MicroBatchLayout(recipe.step.micro_batch, recipe.step.micro_batches, 0, 2)
    return Opening(recipe, RUN, 90, 3, layout, "cpu", 1, "the usual one on CPU", 200, **given).lines()


def test_the_first_lines_say_what_is_trained_on_what():
    """Nothing else is said where all is as the recipe has it."""
    assert said() == [
        "tiny: paco with cifar_resnet8, into runs/a\n"
        "  data       90 images of 3 classes, unused\n"
        "  ranks      2 on cpu, ZeRO stage 1 (the usual one on CPU)\n"
        "  step       4 micro-batches of 8 (2 a rank)\n"
        "  length     200 steps in 2 epochs\n"
        "  precision  float32"
    ]


def test_what_auto_made_of_the_key_encoders_batch_norm_is_said():
    """Only of `auto`, and only where there is a key encoder."""
    auto = "key_encoder.batch_norm=auto"
    assert said(auto, keys_normalised="shuffle")[1:] == [
        "key_encoder.batch_norm auto: shuffle, the key encoder has BatchNorm"
    ]
    assert said(auto, keys_normalised="local")[1:] == [
        "key_encoder.batch_norm auto: local, the key encoder has no BatchNorm"
    ]
    assert said(auto)[1:] == []
    assert said(keys_normalised="shuffle")[1:] == []


def test_what_a_file_filled_is_said_with_the_file_of_all_names():
    """In the words of `Fit`."""
    fit = Fit(7, 0.5, ["a"], [], [], [])
    assert said("model.start_from=x.pt", started_from=fit)[1:] == [
        "starts from x.pt: 7 tensors, 50.0 % of the weights; 1 not in the file (a); all names: runs/a/started_from.json"
    ]


def test_a_learning_rate_by_the_images_of_a_step_is_said():
    """As it is for 256 images, and for these."""
    assert said("optimizer.lr_per_256=true")[1:] == [
        "peak learning rate 0.00625: 0.05 for 256 images, and a step has 32"
    ]


def test_a_scaled_recipe_is_said_with_a_queue_that_is_short_for_it():
    """The hint only where keys are queued."""
    scaled = "step.reference_micro_batches=2"
    rate = (
        "scaled: 4 micro-batches a step where the recipe has 2, so the peak learning rate is 0.1 "
        "(step.lr_scaling linear)"
    )
    hint = "queue.length 80 is under four global batches; consider --set queue.length=128"
    assert said(scaled)[1:] == [rate, hint]
    assert said(scaled, "queue.length=128")[1:] == [rate]
    assert said(scaled, "loss={method: cross_entropy}", "key_encoder=none")[1:] == [rate]
