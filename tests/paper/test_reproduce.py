"""Tables: rows as data, refused where they would mislead; every row launched as a user would."""

import itertools
import json
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from paco_ds.errors import RecipeError, UserError
from paco_ds.metrics.log import MetricsLog
from paco_ds.metrics.steps import StepRecord
from paco_ds.paper import reproduce
from paco_ds.paper.results import KeptResults
from paco_ds.paper.tables import SMALL_RECIPES, Row, Table, load_table, small_recipe
from tests.recipes import model_of

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(ROOT.glob("ds_configs/tables/*.yaml"))
METHODS = SHIPPED[0].parent / "methods.yaml"
ROWS = "title: t\nrecipe: r.yaml\nrows:\n"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_row_of_a_shipped_table_is_a_valid_recipe_and_a_model(path):
    """At every scale; models are made on the meta device."""
    table = load_table(path)
    assert table.rows
    small = [None] if table.scale == "here" else [None, *sorted(SMALL_RECIPES.glob("*.yaml"))]
    for row, recipe in itertools.product(table.rows, small):
        resolved = table.resolve(row, recipe, (f"{row.start}=run",) if row.after else ())
        with torch.device("meta"):
            model_of(resolved, 20)


def test_the_papers_tables_have_their_36_rows():
    """Tables 9 to 14 of the supplement."""
    rows = {n: load_table(str(n)).rows for n in range(9, 15)}
    assert [len(r) for r in rows.values()] == [9, 6, 6, 3, 4, 8]
    assert all(row.paper for table in rows.values() for row in table)


@pytest.mark.parametrize("number", [13, 14])
@pytest.mark.parametrize("small", [None, SMALL_RECIPES / "glyphs.yaml"], ids=["paper", "small"])
def test_rows_that_are_compared_differ_in_their_method_alone(number, small):
    """The same images, views, network, batch, epochs and learning rate: the same budget."""
    table = load_table(str(number))
    first, *others = (table.resolve(row, small).resume_identity() for row in table.rows)
    for other in others:
        assert {key for key in first.keys() | other.keys() if first.get(key) != other.get(key)} <= {
            "loss.method",
            "loss.multi_task.softmax",
            "loss.multi_task.contrast",
            "loss.multi_task.weight",
        }


def test_rows_without_randaugment_have_none():
    """Those of Table 11."""
    plain = [r for r in load_table("11").rows if "without RandAugment" in r.method]
    assert len(plain) == 2
    for row in plain:
        assert load_table("11").resolve(row).views.query.randaugment is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ROWS + "  - {method: CE+BS}\n  - {method: CE BS}\n", r"rows share the run folders \['ce-bs'\]"),
        (
            ROWS + "  - {method: CE}\n  - {method: cross-entropy}\n",
            r"rows 'CE' and 'cross-entropy' name one method in two ways",
        ),
        (ROWS + "  - {metod: x}\n", r"metod"),
        ("title: [", r"t.yaml"),
        (ROWS + "  - {method: LWS, after: CE}\n  - {method: CE}\n", "row LWS is after 'CE', which is no row above it"),
        (
            ROWS + "  - {method: A}\n  - {method: B, after: A}\n  - {method: C, after: B}\n",
            "row C is after 'B', which is a second stage itself",
        ),
        (ROWS + "  - {method: A, drawn: false}\n", r"rows \['A'\] are not drawn, and no row is after them"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path, text, message):
    """With its file, and what is wrong."""
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_table(tmp_path / "t.yaml")


def test_a_missing_table_is_named(tmp_path):
    """With the nearest of those there are."""
    with pytest.raises(RecipeError, match=r"no table table15: .*ds_configs/tables; nearest: table1"):
        load_table("15")
    with pytest.raises(RecipeError, match=r"no table .*x.yaml: "):
        load_table(tmp_path / "x.yaml")


def job(tmp_path, *, small=None, **settings):
    row = Row(**{"method": "Balanced Softmax", "set": ("loss.method=balanced_softmax",), **settings})
    table = Table(title="t", recipe="r.yaml", rows=(row,))
    return reproduce.Job(table, row, 2, tmp_path, small, ("schedule.epochs=1",))


def test_a_row_is_launched_with_its_overrides_and_its_seed(tmp_path, monkeypatch):
    """As a user would type it; also when results are there, which the run itself checks."""
    launched = []
    one = job(tmp_path)
    one.run.mkdir()
    one.results.write_text('{"many": 0.9, "medium": 0.8, "few": null, "all": 0.85}')

    class Done:
        returncode = 0

    monkeypatch.setattr(reproduce.subprocess, "run", lambda command, **_: launched.append(command) or Done)
    reproduce.Trainings(ranks=4, quiet=False).run(one)
    result = one.read()
    assert (result.seed, result.all, result.few) == (2, 0.85, None)
    (command,) = launched
    assert command[0] == sys.executable
    assert command[-7:-4] == ["--set=loss.method=balanced_softmax", "--set=seed=2", "--set=schedule.epochs=1"]
    assert command[-4:] == ["--ranks", "4", "--restarts", "0"]


def test_a_row_at_small_scale_takes_the_small_recipe_and_its_stand_ins(tmp_path):
    """The method's overrides come first."""
    row = Row(method="m", set=("loss.method=ride",), small=("model.backbone=cifar_resnet20",))
    small = reproduce.Job(Table(title="t", recipe="r.yaml", rows=(row,)), row, 1, tmp_path, tmp_path / "s.yaml", ())
    assert small.training(["deepspeed"])[-3:] == [
        "--set=loss.method=ride",
        "--set=model.backbone=cifar_resnet20",
        "--set=seed=1",
    ]


def test_a_row_with_options_of_evaluation_is_read_from_its_evaluation(tmp_path):
    """tau-normalisation belongs to the row, not to the training."""
    one = job(tmp_path, evaluate=("--tau-normalize=auto",))
    assert one.evaluation()[-1] == "--tau-normalize=auto"
    assert one.results.name == "metrics-of-row.json"


def test_rows_not_yet_run_are_named(tmp_path):
    """And nothing is drawn."""
    one = job(tmp_path)
    with pytest.raises(UserError, match=r"1 of 1 runs are missing: Balanced Softmax \(seed 2\)"):
        reproduce.draw(one.table, [one], tmp_path)


def test_a_table_of_a_clusters_size_asks_for_its_scale(tmp_path, capsys):
    """Before anything is trained."""
    with pytest.raises(SystemExit):
        reproduce.main(["--table", "9", "--output", str(tmp_path)])
    assert "give --scale small" in capsys.readouterr().err


def test_commands_of_a_cluster_are_written_as_a_script(tmp_path):
    """Every row and seed, with what was inferred said."""
    assert reproduce.main(["--table", "9", "--scale", "paper", "--seeds", "1", "--output", str(tmp_path)]) == 0
    text = (tmp_path / "commands.sh").read_text()
    assert text.count("deepspeed --hostfile hosts") == 9
    assert text.count("--tau-normalize=auto") == 3
    assert "# inferred: the baseline's lr" in text
    assert text.count("# published in float32: --set engine.precision=published") == 9


def test_commands_of_a_cluster_are_of_the_shards_of_the_card(tmp_path):
    """Where one is given, on the small scale and on the large."""
    card = SMALL_RECIPES.parents[2] / "shards" / "imagenet_lt.yaml"
    arguments = ["--table", "13", "--scale", "paper", "--data", str(card), "--output", str(tmp_path)]
    assert reproduce.main(arguments) == 0
    lines = [line for line in (tmp_path / "commands.sh").read_text().splitlines() if line.startswith("deepspeed")]
    assert len(lines) == 12
    shards = f"--set=data.shards={SMALL_RECIPES.parents[2] / 'data' / 'imagenet-lt'}"
    assert all(shards in shlex.split(line) for line in lines)


def test_a_table_at_small_scale_finds_the_recipe_of_its_card(tmp_path, capsys):
    """Of the card that ships, whose name has capitals."""
    card = SMALL_RECIPES.parents[2] / "shards" / "fashion-mnist-lt.yaml"
    output = ["--output", str(tmp_path), "--keep", str(tmp_path / "kept.jsonl"), "--draw-only"]
    with pytest.raises(SystemExit):
        reproduce.main(["--table", "13", "--scale", "small", "--data", str(card), *output])
    assert "12 of 12 runs are missing: CE (seed 1)" in capsys.readouterr().err


def test_a_data_set_without_a_small_recipe_is_named():
    """With those there are."""
    with pytest.raises(RecipeError, match="there are fashion-mnist-lt, glyphs"):
        small_recipe("mine")


TOP1 = {"many": 0.9, "medium": 0.8, "few": None, "all": 0.85}


def kept_in(tmp_path):
    return KeptResults(tmp_path / "kept.jsonl")


def kept_line(tmp_path, row, change=None):
    """The kept result of a row, changed in its file by a function of it."""
    lines = {line["row"]: line for line in map(json.loads, (tmp_path / "kept.jsonl").read_text().splitlines())}
    if change is not None:
        change(lines[row])
        (tmp_path / "kept.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines.values()))
    return lines[row]


def kept_job(tmp_path, *, seed=1, output="a", extra=(), **settings):
    """A row of the demo's recipe whose results are kept in tmp_path/kept.jsonl."""
    row = Row(**{"method": "PaCo", **settings})
    table = Table(title="t", recipe=str(SMALL_RECIPES.parent / "demo.yaml"), rows=(row,))
    shards = f"data.shards={tmp_path / 'shards'}"
    return reproduce.Job(table, row, seed, tmp_path / output, None, (shards, *extra), kept_in(tmp_path))


def finish(job, *, manifest="0" * 64, figures=TOP1, keep=True):
    """What a training leaves behind, as far as a kept result is made of it."""
    job.run.mkdir(parents=True, exist_ok=True)
    trained = {**figures, "world_size": 2, "seed": job.seed, "manifest_sha256": manifest, "versions": {"torch": "2"}}
    for name in {"metrics.json", job.results.name}:
        world_size = 2 if name == "metrics.json" else 1  # an evaluation has its own
        (job.run / name).write_text(json.dumps(trained | {"world_size": world_size}))
    log = MetricsLog(job.run / "metrics.jsonl")
    for step in (1, 2):
        log.step(StepRecord(step, 0, 1.0, 0.1, 1.0, 64.0, 0.0, 1.25))
    log.close()
    if keep:
        job.keep_result()


def never_launch(command, **_):
    raise AssertionError(f"launched {command}")


def test_a_kept_result_says_what_was_trained_and_names_no_place(tmp_path):
    """Recipe, seed, versions, data, ranks and seconds of the training; no path of this machine."""
    one = kept_job(tmp_path, evaluate=("--tau-normalize=auto",))
    finish(one)
    text, kept = (tmp_path / "kept.jsonl").read_text(), kept_line(tmp_path, "paco-seed1")
    assert {"ranks": 2, "seconds": 2.5, "seed": 1, "manifest_sha256": "0" * 64, "versions": {"torch": "2"}}.items() <= (
        kept.items()
    )
    assert (kept["recipe"]["loss.method"], kept["evaluate"]) == ("paco", ["--tau-normalize=auto"])
    assert str(tmp_path) not in text
    assert str(SMALL_RECIPES.parents[2]) not in text


def test_a_kept_result_counts_as_done_in_another_clone(tmp_path, monkeypatch):
    """Nothing is launched, and the page is drawn without runs or shards."""
    finish(kept_job(tmp_path))
    elsewhere = kept_job(tmp_path, output="b", extra=("data.workers=3",))  # where it runs may differ
    monkeypatch.setattr(reproduce.subprocess, "run", never_launch)
    reproduce.Trainings(ranks=4, quiet=False).run(elsewhere)
    reproduce.draw(elsewhere.table, [elsewhere], elsewhere.output)
    assert "85.0" in (elsewhere.output / "comparison.html").read_text()


def test_a_finished_run_is_kept(tmp_path, monkeypatch):
    """As soon as its training has ended."""
    one = kept_job(tmp_path)

    class Done:
        returncode = 0

    def train(command, **_):
        finish(one, keep=False)
        return Done

    monkeypatch.setattr(reproduce.subprocess, "run", train)
    reproduce.Trainings(ranks=2, quiet=False).run(one)
    assert one.read().all == 0.85
    assert one.kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": ("optimizer.lr=0.3",)}, r"optimizer.lr: 0.2 there, 0.3 now"),
        ({"extra": ("evaluation.checkpoint=best_all",)}, r"evaluation.checkpoint: 'last' there, 'best_all' now"),
        ({"evaluate": ("--tau-normalize=auto",)}, r"options of the evaluation: \[\] there"),
    ],
)
def test_a_kept_result_of_another_training_is_refused(tmp_path, change, message):
    """Before anything is trained, each difference and the way out named."""
    finish(kept_job(tmp_path))
    with pytest.raises(UserError, match=message) as error:
        kept_job(tmp_path, output="b", **change).check()
    assert "another --keep file" in str(error.value)


def test_a_kept_result_of_other_shards_is_refused(tmp_path):
    """By those that are here, and without any by the other results."""
    finish(kept_job(tmp_path))
    finish(kept_job(tmp_path, seed=2), manifest="1" * 64)
    jobs = [kept_job(tmp_path, output="b", seed=seed) for seed in (1, 2)]
    with pytest.raises(UserError, match="PaCo, seed 1 was trained on other shards than PaCo, seed 2"):
        reproduce.draw(jobs[0].table, jobs, tmp_path)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"shards \(manifest\): '0{12}' there, '44136fa355b3' now"):
        jobs[0].check()


def test_a_file_that_is_no_kept_result_is_named(tmp_path):
    """A metrics.json that was copied there by hand, say."""
    for line, message in (
        (TOP1, "line 1 of .*kept.jsonl is not a kept result"),
        (TOP1 | {"row": "paco-seed1"}, r"kept.jsonl: paco-seed1 is not a kept result \(KeyError\('recipe'\)\)"),
        ("{", "line 1 of .*kept.jsonl is not JSON"),
    ):
        (tmp_path / "kept.jsonl").write_text(line if isinstance(line, str) else json.dumps(line))
        with pytest.raises(UserError, match=message):
            kept_job(tmp_path).check()


def test_results_of_rows_that_end_at_a_time_are_all_kept(tmp_path):
    """Each line is whole, and those of other rows stay; they are sorted, so that a difference is small."""
    jobs = [kept_job(tmp_path, seed=seed) for seed in range(8, 0, -1)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(finish, jobs))
    names = [json.loads(line)["row"] for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert names == [f"paco-seed{seed}" for seed in range(1, 9)]


def test_a_folder_of_kept_results_is_refused(tmp_path):
    """As they were kept until 0.12."""
    with pytest.raises(UserError, match="is a folder: results are kept in one file"):
        KeptResults(tmp_path)


def test_the_kept_results_of_the_project_are_of_its_tables():
    """Each line is a training of today's recipe of its row, so that `--draw-only` draws the pages of docs/."""
    for name in ("fashion-mnist-lt", "glyphs"):
        keep, small = KeptResults(ROOT / "results" / f"{name}.jsonl"), small_recipe(name)
        for table, seeds in ((load_table("13"), 3), (load_table("14"), 3)):
            for row, seed in itertools.product(table.rows, range(1, seeds + 1)):
                job = reproduce.Job(table, row, seed, Path("runs"), small, (f"data.shards={name}",), keep)
                assert job.kept, job.name
                job.check()


def test_a_setting_younger_than_a_kept_result_is_at_its_default(tmp_path):
    """A new version with another setting does not make old results worthless."""
    one = kept_job(tmp_path)
    finish(one)
    kept_line(tmp_path, "paco-seed1", lambda kept: kept["recipe"].pop("step.mixup"))
    kept_job(tmp_path, output="b").check()


def test_rows_that_two_tables_share_are_trained_once(tmp_path):
    """PaCo of Table 13 and of Table 14, whose stand-ins are equal at small scale."""
    small, no_shards = small_recipe("fashion-mnist-lt"), (f"data.shards={tmp_path}/shards",)
    jobs = [
        reproduce.Job(table, table.rows[-1], 1, tmp_path / f"{number}", small, no_shards, kept_in(tmp_path))
        for number in (13, 14)
        for table in [load_table(str(number))]
    ]
    finish(jobs[0])
    jobs[1].check()
    assert jobs[1].done


def second_stage(tmp_path, *, keep=True, output="a", first_set=(), extra=()):
    """(first stage, second stage that starts from it), both of the demo's recipe on two rows of one table."""
    first = Row(method="SupCon, first stage", set=("loss.method=supcon", *first_set), drawn=False)
    trained = ("loss.method=cross_entropy", "model.trained=centers")
    second = Row(method="SupCon, two stages", after=first.name, set=trained)
    table = Table(title="t", recipe=str(SMALL_RECIPES.parent / "demo.yaml"), rows=(first, second))
    kept, shards = kept_in(tmp_path) if keep else None, f"data.shards={tmp_path / 'shards'}"
    job = reproduce.Job(table, second, 3, tmp_path / output, None, (shards, *extra), kept)
    return job.first_stage, job


def launched_by(monkeypatch, job):
    """Run directories of the trainings that are launched, each finished at once."""
    runs = []

    class Done:
        returncode = 0

    def train(command, **_):
        runs.append(Path(command[command.index("--output") + 1]))
        finish(next(each for each in (job, job.first_stage) if each.run == runs[-1]), keep=False)
        return Done

    monkeypatch.setattr(reproduce.subprocess, "run", train)
    reproduce.Trainings(ranks=2, quiet=False).run(job)
    return runs


def test_a_second_stage_starts_from_the_run_of_its_first_with_the_same_seed(tmp_path, monkeypatch):
    """Which is trained before it, and whose recipe is kept with its result."""
    first, second = second_stage(tmp_path)
    second.check()
    assert launched_by(monkeypatch, second) == [first.run, second.run]
    assert f"--set=model.start_from={tmp_path}/a/supcon--first-stage-seed3" in second.training([])
    kept = kept_line(tmp_path, "supcon--two-stages-seed3")
    assert (kept["recipe"]["model.trained"], kept["first_stage"]["loss.method"]) == ("centers", "supcon")
    assert not first.kept


def test_a_second_stage_of_which_the_result_is_kept_trains_no_first_stage(tmp_path, monkeypatch):
    """Unless the first stage is another one, which is refused and said."""
    finish(second_stage(tmp_path)[1])
    elsewhere = second_stage(tmp_path, output="b")[1]
    elsewhere.check()
    assert launched_by(monkeypatch, elsewhere) == []
    other = second_stage(tmp_path, output="c", first_set=("loss.temperature=0.7",))[1]
    with pytest.raises(UserError, match=r"first stage: loss.temperature: 0.3 there, 0.7 now"):
        other.check()


def test_the_start_of_a_second_stage_is_its_first_whatever_is_set_for_every_row(tmp_path):
    """`--set model.start_from=` is for first stages."""
    first, second = second_stage(tmp_path, extra=("model.start_from=torchvision:IMAGENET1K_V2",))
    assert second.training([])[-1] == f"--set=model.start_from={first.run}"
    assert first.recipe.model.start_from == "torchvision:IMAGENET1K_V2"


def test_a_row_may_be_taught_by_another_with_another_network(tmp_path):
    """Whose run of the same seed is its teacher; the kept result says what taught it."""
    table = load_table("settings")
    student = next(row for row in table.rows if row.name == "RIDE, 3 experts, taught by 6")
    job = reproduce.Job(table, student, 3, tmp_path, None, (f"data.shards={tmp_path}/shards",), kept_in(tmp_path))
    job.check()
    assert job.training([])[-1] == f"--set=loss.distill.teacher={tmp_path}/ride--6-experts-seed3"
    finish(job)
    kept = kept_line(tmp_path, "ride--3-experts--taught-by-6-seed3")
    assert (kept["recipe"]["model.experts"], kept["first_stage"]["model.experts"]) == (3, 6)
    assert kept["recipe"]["loss.distill.temperature"] == 1.5


def test_stages_of_different_networks_are_refused_before_anything_is_trained(tmp_path):
    """With what differs."""
    second = second_stage(tmp_path, first_set=("model.width=8",))[1]
    with pytest.raises(RecipeError, match=r"seed3 was trained with another network: width 8 there, 16 here"):
        second.check()


def test_a_kept_result_without_a_first_stage_is_none_of_a_second_stage(tmp_path):
    """And the other way round: where a training started from is part of what it is."""
    second = second_stage(tmp_path)[1]
    finish(second)
    kept_line(tmp_path, "supcon--two-stages-seed3", lambda kept: kept.pop("first_stage"))
    with pytest.raises(UserError, match="starts from a first stage: False there, True now"):
        second.check()


def two_second_stages(tmp_path):
    """(their first stage, two jobs that start from it)."""
    first = Row(method="CE", set=("loss.method=cross_entropy",))
    rows = [
        Row(method=name, after="CE", set=(f"model.trained={trained}", "loss.method=cross_entropy"))
        for name, trained in (("cRT", "centers"), ("LWS", "center_scales"))
    ]
    table = Table(title="t", recipe=str(SMALL_RECIPES.parent / "demo.yaml"), rows=(first, *rows))
    jobs = [reproduce.Job(table, row, 1, tmp_path, None, (f"data.shards={tmp_path}/shards",)) for row in rows]
    return jobs[0].first_stage, jobs


@pytest.mark.parametrize("status", [0, 1])
def test_rows_at_a_time_that_start_from_one_run_train_it_once(tmp_path, monkeypatch, status):
    """Both wait for it; if it fails, neither is begun."""
    first, jobs = two_second_stages(tmp_path)
    launched = []

    def train(command, **_):
        launched.append(Path(command[command.index("--output") + 1]))
        if launched[-1] == first.run:
            time.sleep(0.1)  # long enough for the other row to come for it
        finish(next(job for job in (first, *jobs) if job.run == launched[-1]), keep=False)
        return subprocess.CompletedProcess(command, status if launched[-1] == first.run else 0)

    monkeypatch.setattr(reproduce.subprocess, "run", train)
    if status:
        with pytest.raises(UserError, match=r"CE, seed 1 did not finish; see .*run\.log"):
            reproduce.run_jobs(jobs, ranks=1, at_once=2)
        assert launched == [first.run]
    else:
        reproduce.run_jobs(jobs, ranks=1, at_once=2)
        assert launched[0] == first.run
        assert sorted(launched[1:]) == sorted(job.run for job in jobs)


def test_rows_that_are_not_drawn_are_no_results_that_are_missing(tmp_path, capsys):
    """Of the 27 rows of methods.yaml three are a first stage alone."""
    with pytest.raises(SystemExit):
        reproduce.main(["--table", str(METHODS), "--seeds=1", "--draw-only", f"--output={tmp_path}"])
    assert "25 of 25 runs are missing" in capsys.readouterr().err


def test_a_first_stage_alone_is_trained_and_not_drawn(tmp_path):
    """Its centers are as they were drawn, so its figures say nothing."""
    _, second = second_stage(tmp_path, keep=False)
    finish(second)
    reproduce.draw(second.table, [second], tmp_path)
    assert "first stage" not in (tmp_path / "comparison.html").read_text()


def test_a_first_stage_that_two_rows_start_from_is_in_the_script_once(tmp_path):
    """Before both."""
    table = load_table(METHODS)
    rows = [row for row in table.rows if row.name in ("CE, LWS", "CE, cRT", "SupCon, two stages")]
    reproduce.write_commands([reproduce.Job(table, row, 1, tmp_path, None, ()) for row in rows], tmp_path / "c.sh")
    titles = [line for line in (tmp_path / "c.sh").read_text().splitlines() if line.endswith("seed 1")]
    assert [title.strip("# ").removesuffix(", seed 1") for title in titles] == [
        "CE, first stage", "CE, cRT", "CE, LWS", "SupCon, first stage", "SupCon, two stages"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("precisions", "said"),
    [
        (("float32", "float32"), None),
        (("bfloat16", "bfloat16"), "bfloat16 where float32 is published"),
        (("float32", "bfloat16"), "bfloat16 where float32 is published"),
        ((None, None), None),
    ],
)
def test_runs_in_another_precision_than_published_are_a_deviation(tmp_path, precisions, said):
    """By their metrics; those of earlier versions, which do not say, are none."""
    table, jobs = load_table("9"), []
    for seed, precision in enumerate(precisions, 1):
        each = reproduce.Job(table, table.rows[2], seed, tmp_path, None, ())
        each.run.mkdir()
        execution = {} if precision is None else {"execution": {"precision": precision}}
        each.results.write_text(json.dumps(execution))
        jobs.append(each)
    assert reproduce._deviation(jobs) == said
