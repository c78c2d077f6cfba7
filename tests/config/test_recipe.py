"""Recipes: every setting typed, every mistake answered with the key, the place and the nearest valid name."""

from pathlib import Path

import pytest
import yaml

from paco_ds.config.load import load_recipe
from paco_ds.config.parse import parse_yaml
from paco_ds.errors import RecipeError
from tests.recipes import TINY, tiny_recipe

SHIPPED = sorted(Path(__file__).parents[2].glob("ds_configs/recipes/*.yaml"))


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(TINY)
    return file


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(path):
    """And leave to the hardware what it decides."""
    recipe = load_recipe(path)
    assert (recipe.engine.deepspeed, recipe.engine.precision, recipe.engine.channels_last) == ("auto", "auto", "auto")
    assert recipe.step.scale == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optimizer.learning_rate=1",
            r"--set optimizer.learning_rate=1: unknown key 'optimizer.learning_rate'; nearest",
        ),
        ("los.alpha=1", r"unknown key 'los'; nearest valid name: 'loss'"),
        ("views.query.cutot=1", r"unknown key 'views.query.cutot'; nearest valid name: 'views.query.cutout'"),
        ("optimizer.lr=fast", r"--set optimizer.lr=fast: 'optimizer.lr': .*valid number.*given: 'fast'"),
        ("step.micro_batch=1.5", r"'step.micro_batch': .*valid integer"),
        ("loss.alpha=-1", r"'loss.alpha': .*greater than 0"),
        ("loss.temperature=.inf", r"'loss.temperature': .*finite"),
        ("step.micro_batches=true", r"'step.micro_batches': a number is expected here, not true or false"),
        ("views.query.zoom=[0.5", r"--set views.query.zoom=\[0.5: the value is not valid YAML"),
        (
            "loss.method=packo",
            r"'loss.method': unknown method 'packo'; nearest valid name: 'paco' .*, supcon",
        ),
        ("schedule.warmup_epochs=2", r"'schedule': warmup_epochs 2 leaves nothing of 2 epochs"),
        ("views.key.size=16", r"'views': query.size 12 and key.size 16 differ"),
        ("views.evaluation.resize=8", r"'views.evaluation': resize 8 is smaller than the crop size 12"),
        ("views.evaluation.size=1000000000", r"'views.evaluation.size': .*less than or equal to 16384"),
        ("seed=010", r"010 would be read as a number to another base: write it without leading zeros"),
        ("optimizer.lr=1:30", r"1:30 would be read as a number to another base"),
        ("seed", r"write key.path=value"),
        ("seed.deeper=1", r"'seed' is a setting, not a section$"),
        ("key_encoder.momentum_schedule=linear", r"'key_encoder.momentum_schedule': .*'constant' or 'cosine'"),
        ("loss.method=sys:x", r"loss.method sys:x: sys has no x"),
        ("key_encoder=nothing", r"'key_encoder': .*given: 'nothing'"),
    ],
)
def test_a_wrong_override_names_the_key_and_the_remedy(path, override, message):
    """Unknown, ill-typed, out of range, or not fitting another setting."""
    with pytest.raises(RecipeError, match=message):
        load_recipe(path, [override])


def test_a_section_that_is_null_in_the_file_can_be_set(path):
    """As in the recipe that a run writes; only a key encoder of none stays none."""
    recipe = load_recipe(path, ["data.cache=null", "data.cache.directory=/c", "data.cache.bytes=9"])
    assert (recipe.data.cache.directory, recipe.data.cache.bytes) == ("/c", 9)
    with pytest.raises(RecipeError, match="'key_encoder' is a setting, not a section, while it is none"):
        load_recipe(path, ["key_encoder=null", "key_encoder.momentum=0.9"])


def test_a_mistake_in_the_file_names_the_file(path):
    """All mistakes at once, one line each."""
    path.write_text(TINY.replace("alpha", "alhpa").replace("lr: 0.05", "lr: fast"))
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert all(line.startswith(str(path)) for line in lines)
    assert "'loss.alpha'" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not valid YAML"),
        ("- a", "must be a mapping of settings, not list"),
        ("a: 1\na: 2", "key 'a' is given twice"),
        ("!!python/object/apply:os.system ['true']", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(path, text, message):
    """Duplicate keys too, of which YAML would keep the last in silence; and nothing is executed."""
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_a_missing_file_and_a_missing_setting_are_named(tmp_path, path):
    """With where to look, or what to give."""
    with pytest.raises(RecipeError, match=r"no recipe .*absent.yaml: .*ds_configs/recipes; nearest: "):
        load_recipe(tmp_path / "absent.yaml")
    path.write_text(TINY.replace("optimizer: {lr: 0.05}", "optimizer: {}"))
    with pytest.raises(RecipeError, match=r"'optimizer.lr' is missing; .* --set optimizer.lr="):
        load_recipe(path)


def test_settings_may_be_merged_from_an_anchor():
    """`<<: *other`, whose keys the mapping itself may set otherwise; one given twice is still refused."""
    merged = parse_yaml("base: &b {x: 1, y: 2}\nown: {<<: *b, y: 3}", "text", RecipeError)
    assert merged["own"] == {"x": 1, "y": 3}
    with pytest.raises(RecipeError, match="key 'y' is given twice"):
        parse_yaml("base: &b {x: 1}\nown: {<<: *b, y: 3, y: 4}", "text", RecipeError)


def test_overrides_are_yaml_and_reach_any_depth(path):
    """Numbers, lists, null and strings."""
    recipe = load_recipe(path, ["views.query.zoom=[0.5, 2]", "optimizer.clip_norm=null", "optimizer.lr=1e-2", "name=x"])
    assert recipe.views.query.zoom == (0.5, 2.0)
    assert recipe.optimizer.clip_norm is None
    assert recipe.optimizer.lr == 0.01
    assert recipe.name == "x"


def test_one_encoder_is_written_as_none_and_has_no_groups_to_shuffle(path):
    """`key_encoder: none`, kept through writing; what belongs to a key encoder is refused with it, saying why."""
    recipe = load_recipe(path, ["key_encoder=none"])
    assert recipe.key_encoder is None
    assert load_recipe(_written(path, recipe)) == recipe
    with pytest.raises(RecipeError, match=r"key_encoder.batch_norm=shuffle.*while it is none.*no groups.*to shuffle"):
        load_recipe(path, ["key_encoder=none", "key_encoder.batch_norm=shuffle"])
    with pytest.raises(RecipeError, match=r"contrast_scope global_batch needs keys.*set loss.contrast_scope to micro"):
        load_recipe(path, ["key_encoder=none", "loss.contrast_scope=global_batch"])


def test_paths_are_relative_to_the_file_or_to_where_the_command_runs(path, tmp_path, monkeypatch):
    """A recipe finds its files from anywhere; an override means what the shell would; URLs stay."""
    monkeypatch.chdir("/")
    assert load_recipe(path).data.shards == str(tmp_path / "unused")
    assert load_recipe(path, ["data.shards=elsewhere"]).data.shards == "/elsewhere"
    assert load_recipe(path, ["data={shards: elsewhere}"]).data.shards == "/elsewhere"
    assert load_recipe(path, ["data.shards=s3://bucket/x"]).data.shards == "s3://bucket/x"


def test_the_learning_rate_scales_with_the_micro_batches(path):
    """It was chosen for the recipe's own M."""
    assert load_recipe(path).lr == 0.05
    scaled = load_recipe(path, ["step.micro_batches=8"])
    assert (scaled.lr, scaled.step.scale) == (0.1, 2.0)
    again = load_recipe(_written(path, scaled))
    assert again.lr == 0.1


@pytest.mark.parametrize(("scaling", "lr"), [("linear", 0.2), ("square_root", 0.1), ("none", 0.05)])
def test_the_learning_rate_scales_as_the_recipe_says(path, scaling, lr):
    """Four times the micro-batches; run as written, it is the recipe's."""
    how = f"step.lr_scaling={scaling}"
    assert load_recipe(path, ["step.micro_batches=16", how]).lr == pytest.approx(lr)
    assert load_recipe(path, [how]).lr == 0.05


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["key_encoder.shuffle_block=3"],
            r"shuffle_block 3 does not divide step.micro_batches 4: set it to one of 2, 4",
        ),
        (["key_encoder.shuffle_block=2", "step.micro_batches=1"], r"does not divide .* 1: set it to null"),
        (
            ["key_encoder.shuffle_block=2", "key_encoder.batch_norm=local"],
            r"shuffle_block bounds the shuffle.*leave it",
        ),
        (["key_encoder.shuffle_block=1"], r"key_encoder.shuffle_block"),
    ],
)
def test_a_block_of_the_shuffle_fits_the_step(path, overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(path, overrides)


def _written(path, recipe):
    path.write_text(recipe.to_yaml())
    return path


def test_a_recipe_survives_being_written(path):
    """What a run directory keeps is the recipe."""
    recipe = load_recipe(path, ["optimizer.clip_norm=3"])
    assert load_recipe(_written(path, recipe)) == recipe
    assert yaml.safe_load(recipe.to_yaml())["optimizer"]["clip_norm"] == 3


def test_meaning_leaves_out_how_and_where_a_run_is_computed():
    """What a resumed run must agree on."""
    meaning = tiny_recipe().resume_identity()
    assert {"seed", "loss.alpha", "step.micro_batches", "views.query.cutout", "data.window"} <= meaning.keys()
    assert not [k for k in meaning if k.split(".")[0] in ("engine", "checkpoint", "evaluation", "metrics", "name")]
    assert not {"data.shards", "data.workers", "data.max_bad_share"} & meaning.keys()


class TestRenamed:
    @pytest.mark.parametrize("place", ["file", "override"])
    def test_a_former_name_of_a_setting_is_accepted_with_a_warning(self, place, tmp_path, caplog):
        """As written by an earlier version, or by its users."""
        engine = "engine: {deepspeed: zero1, max_refused: 7}" if place == "file" else "engine: {deepspeed: zero1}"
        (tmp_path / "old.yaml").write_text(f"base: demo\n{engine}\n")
        recipe = load_recipe(tmp_path / "old.yaml", ["engine.max_refused=7"] if place == "override" else [])
        assert recipe.engine.max_skipped == 7
        assert "engine.max_refused is called engine.max_skipped now" in caplog.text

    @pytest.mark.parametrize("place", ["file", "override"])
    @pytest.mark.parametrize("name", ["zero1_autocast", "zero2_offload_autocast", "/gone/zero1_autocast.json"])
    def test_deepspeed_files_with_autocast_are_a_stage_and_a_precision(self, name, place, tmp_path, caplog):
        """Of a run folder's recipe.yaml too, whose checkout is gone; a precision given by name stands."""
        file = f"engine: {{deepspeed: {name}}}" if place == "file" else "engine: {deepspeed: zero0}"
        (tmp_path / "old.yaml").write_text(f"base: demo\n{file}\n")
        override = [f"engine.deepspeed={name}"] if place == "override" else []
        engine = load_recipe(tmp_path / "old.yaml", override).engine
        stage = name.rpartition("/")[2].partition("_autocast")[0]
        assert (Path(engine.deepspeed).name, engine.precision) == (f"{stage}.json", "bfloat16")
        assert Path(engine.deepspeed).is_file()
        assert f"{stage} and engine.precision=bfloat16 now" in caplog.text
        assert load_recipe(tmp_path / "old.yaml", [*override, "engine.precision=float32"]).engine.precision == "float32"

    def test_a_users_own_file_of_that_name_stays(self, tmp_path):
        """What it says about autocast is read with it."""
        (tmp_path / "zero1_autocast.json").write_text("{}")
        (tmp_path / "mine.yaml").write_text("base: demo\nengine: {deepspeed: zero1_autocast.json}\n")
        engine = load_recipe(tmp_path / "mine.yaml").engine
        assert (engine.deepspeed, engine.precision) == (str(tmp_path / "zero1_autocast.json"), "auto")

    def test_the_engine_of_an_earlier_version_loads(self, tmp_path):
        """As a run of 0.13 wrote it into its folder."""
        engine = "{deepspeed: /gone/zero1.json, channels_last: false, activation_checkpointing: false, compile: true}"
        (tmp_path / "recipe.yaml").write_text(f"base: demo\nengine: {engine}\n")
        loaded = load_recipe(tmp_path / "recipe.yaml").engine
        assert (loaded.channels_last, loaded.compile, loaded.precision) == (False, "default", "auto")

    def test_auto_is_no_path(self, tmp_path):
        """Neither in a file nor on the command line."""
        (tmp_path / "mine.yaml").write_text("base: demo\nengine: {deepspeed: auto}\n")
        assert load_recipe(tmp_path / "mine.yaml").engine.deepspeed == "auto"
        assert load_recipe("demo", ["engine.deepspeed=auto"]).engine.deepspeed == "auto"

    def test_both_names_in_one_file_are_refused(self, tmp_path):
        """Which of them should hold?"""
        (tmp_path / "both.yaml").write_text("base: demo\nengine: {max_refused: 7, max_skipped: 8}\n")
        with pytest.raises(RecipeError, match=r"both.yaml: 'engine.max_refused' is the former name of 'engine.max_sk"):
            load_recipe(tmp_path / "both.yaml")


class TestBase:
    """Recipes share parts by one level."""

    def write(self, folder, own, shared=None):
        (folder / "shared.yaml").write_text(tiny_recipe().to_yaml() if shared is None else shared)
        (folder / "own.yaml").write_text(own)
        return folder / "own.yaml"

    def test_what_a_recipe_says_stands_over_its_base(self, tmp_path):
        """Section by section; a view of another kind replaces the base's."""
        own = "base: shared.yaml\nname: own\nloss: {alpha: 0.5}\nviews: {key: {name: regular, size: 12}}\n"
        recipe = load_recipe(self.write(tmp_path, own))
        assert (recipe.name, recipe.loss.alpha, recipe.loss.temperature) == ("own", 0.5, 0.2)
        assert (recipe.views.key.name, recipe.views.query.name) == ("regular", "small")

    def test_paths_of_the_base_are_relative_to_the_base(self, tmp_path):
        """And those of the recipe to the recipe."""
        (tmp_path / "below").mkdir()
        shared = tiny_recipe().to_yaml().replace("deepspeed: unused", "deepspeed: zero1.json")
        path = self.write(tmp_path, "", shared)
        own = tmp_path / "below" / "own.yaml"
        own.write_text("base: ../shared.yaml\ndata: {shards: mine}\n")
        recipe = load_recipe(own)
        assert recipe.engine.deepspeed == str(path.parent / "zero1.json")
        assert recipe.data.shards == str(tmp_path / "below" / "mine")

    def test_micro_batches_of_the_recipe_are_the_reference_of_its_learning_rate(self, tmp_path):
        """Not the base's."""
        recipe = load_recipe(self.write(tmp_path, "base: shared.yaml\nstep: {micro_batches: 8}\n", TINY))
        assert (recipe.step.reference_micro_batches, recipe.step.scale) == (8, 1.0)

    @pytest.mark.parametrize(
        ("own", "message"),
        [
            ("base: nowhere.yaml\n", "no recipe nowhere.yaml"),
            ("base: 3\n", "base is a recipe, by a path"),
            ("base: own.yaml\n", "has a base of its own"),
        ],
    )
    def test_a_base_that_cannot_be_is_refused(self, tmp_path, own, message):
        """Missing, no path, or a chain."""
        with pytest.raises(RecipeError, match=message):
            load_recipe(self.write(tmp_path, own))


@pytest.mark.parametrize(
    ("name", "backbone", "alpha", "lr", "global_batch"),
    [
        ("gpaco_imagenet_lt_resnet50", "resnet50", 0.045, 0.04, 128),
        ("gpaco_imagenet_lt_resnext50", "resnext50_32x4d", 0.05, 0.06, 128),
        ("gpaco_imagenet_lt_resnext101", "resnext101_32x4d", 0.05, 0.06, 128),
        ("gpaco_inaturalist2018_resnet50", "resnet50", 0.05, 0.04, 128),
        ("gpaco_inaturalist2018_resnet152", "resnet152", 0.05, 0.04, 128),
        ("gpaco_places_lt_resnet152", "resnet152", 0.02, 0.02, 128),
    ],
)
def test_gpaco_has_its_published_settings(name, backbone, alpha, lr, global_batch):
    """One encoder, a head of three layers, and what its scripts set."""
    recipe = load_recipe(Path(__file__).parents[2] / "ds_configs" / "recipes" / f"{name}.yaml")
    assert (recipe.key_encoder, recipe.model.projection) == (None, "three_layer")
    assert (recipe.model.backbone, recipe.loss.alpha, recipe.optimizer.lr) == (backbone, alpha, lr)
    assert (recipe.step.global_batch, recipe.queue.length) == (global_batch, 8192)


def test_nothing_is_chosen_on_the_test_split():
    """Neither the best weights, where a set has no other split."""
    with pytest.raises(RecipeError, match="would be chosen on val, the test split"):
        tiny_recipe("evaluation.checkpoint=best_all", "evaluation.split=val", "evaluation.test_split=val")
