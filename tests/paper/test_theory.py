"""The paper's closed forms against its own figures, numerical minima and autograd; the command that uses them."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from paco_ds.paper import equations, theory
from tests.paper import closed_forms

SHIPPED_CARD = Path(__file__).resolve().parents[2] / "shards" / "fashion-mnist-lt.yaml"


def test_center_probability_of_balanced_imagenet_is_071():
    """Section 3.4: 1000 balanced classes, queue 8192, alpha .05."""
    assert closed_forms.paco_optimum(8192 / 1000, 0.05)[1] == pytest.approx(0.71, abs=0.005)
    exact = equations.expected_positives(1 / 1000, queue_length=8192, micro_batch=32)
    assert closed_forms.paco_optimum(exact, 0.05)[1] == pytest.approx(0.71, abs=0.005)


def test_expected_positives_counts_queue_queries_and_keys():
    """Eq. (9), for arrays too."""
    np.testing.assert_allclose(equations.expected_positives(np.array([0.5, 0.01]), 100, 8), [57.5, 1.15])


@pytest.mark.parametrize("alpha", [0.05, 1.0])
def test_optimum_spends_all_probability(alpha):
    """K p+ + p_c = 1 (Remark 2), and K p+ = 1 (Remark 1)."""
    p_positive, p_center = closed_forms.paco_optimum(12.0, alpha)
    assert 12 * p_positive + p_center == pytest.approx(1)
    assert p_positive == pytest.approx(alpha * p_center)
    assert 12 * closed_forms.supcon_optimum(12.0) == pytest.approx(1)


def minimise(loss, terms: int, p_sum: float) -> tuple[torch.Tensor, float]:
    """The probabilities, of sum p_sum, at which a loss of them is least, and that loss: float64, free logits."""
    logits = torch.linspace(-1, 1, terms, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        value = loss(p_sum * logits.softmax(0))
        value.backward()
        return value

    optimiser.step(closure)
    p = p_sum * logits.detach().softmax(0)
    return p, loss(p).item()


@pytest.mark.parametrize("p_sum", [1.0, 0.6])
class TestMinima:
    """Minimised numerically in float64."""

    @pytest.mark.parametrize("positives", [1, 6, 40])
    def test_supcon_ends_at_remark_1_and_equation_12(self, positives, p_sum):
        """Eq. (3), summed: p+ = p_sum / K and the loss of Eq. (12)."""
        p, least = minimise(lambda p: -p.log().sum(), positives, p_sum)
        np.testing.assert_allclose(p, p_sum * closed_forms.supcon_optimum(float(positives)), rtol=1e-6)
        assert least == pytest.approx(closed_forms.supcon_minimum(positives, p_sum), rel=1e-10, abs=1e-12)

    @pytest.mark.parametrize("alpha", [0.05, 0.4])
    @pytest.mark.parametrize("positives", [1, 6, 40])
    def test_paco_ends_at_remark_2_and_equation_17(self, positives, alpha, p_sum):
        """Eq. (14): p_c and p+ of Remark 2 times p_sum, and the loss of Eq. (17)."""
        p, least = minimise(lambda p: -p[0].log() - alpha * p[1:].log().sum(), 1 + positives, p_sum)
        p_positive, p_center = closed_forms.paco_optimum(positives, alpha)
        np.testing.assert_allclose(p[0], p_sum * p_center, rtol=1e-6)
        np.testing.assert_allclose(p[1:], p_sum * p_positive, rtol=1e-6)
        assert least == pytest.approx(closed_forms.paco_minimum(positives, alpha, p_sum), rel=1e-10)


@pytest.mark.parametrize("own", [True, False])
def test_equation_18_is_the_gradient_of_a_center(own):
    """Autograd of Eq. (13) in float64: dL/dc_k = ((alpha K* + 1) p_ck - [y = k]) x."""
    generator = torch.Generator().manual_seed(0)
    alpha, positives, label = 0.3, 5, 2
    feature, query = (torch.randn(4, dtype=torch.float64, generator=generator) for _ in range(2))
    centers = torch.randn(6, 4, dtype=torch.float64, generator=generator).requires_grad_()
    contrasts = torch.randn(12, 4, dtype=torch.float64, generator=generator)  # the first `positives` have the label
    log_p = torch.cat([centers @ feature, contrasts @ query]).log_softmax(0)
    loss = -log_p[label] - alpha * log_p[6 : 6 + positives].sum()
    (gradient,) = torch.autograd.grad(loss, centers)
    k = label if own else 4
    scale = closed_forms.center_gradient_scale(float(log_p[k].detach().exp()), alpha, positives, own=own)
    np.testing.assert_allclose(gradient[k], scale * feature, rtol=1e-12)


def test_own_center_is_pulled_up_to_its_optimum_only():
    """Eq. (19): the own center's gradient changes sign at 1 / (1 + alpha K*), others are pushed away."""
    optimum = closed_forms.paco_optimum(8.192, 0.05)[1]
    assert closed_forms.center_gradient_scale(optimum, 0.05, 8.192, own=True) == pytest.approx(0)
    assert closed_forms.center_gradient_scale(optimum - 0.01, 0.05, 8.192, own=True) < 0
    assert closed_forms.center_gradient_scale(0.01, 0.05, 8.192, own=False) > 0


class TestPositives:
    """How many positives an anchor meets, where the paper has an approximation."""

    def test_a_small_case_is_the_enumeration_of_all_draws(self):
        """Micro-batch of 3, queue of 2: two other images that bring two positives each, two keys that bring one."""
        q, expected = 0.3, np.zeros(8)
        for draws in itertools.product([False, True], repeat=4):
            expected[1 + 2 * sum(draws[:2]) + sum(draws[2:])] += np.prod([q if hit else 1 - q for hit in draws])
        K, probability = equations.positives_distribution(q, queue_length=2, micro_batch=3)
        np.testing.assert_array_equal(K, np.arange(1, 8))
        np.testing.assert_allclose(probability, expected[1:], rtol=1e-13)

    @pytest.mark.parametrize("prior", [1e-6, 0.003, 0.4, 1.0])
    @pytest.mark.parametrize(("queue", "m"), [(0, 1), (0, 8), (8192, 32), (10**6, 64)])
    def test_mean_and_variance_are_those_of_independent_draws(self, prior, queue, m):
        """1 + q (queue + 2 m - 2), and q (1 - q) (queue + 4 (m - 1)); probabilities sum to 1."""
        K, probability = equations.positives_distribution(prior, queue, m)
        mean = K @ probability
        assert probability.sum() == pytest.approx(1, abs=1e-12)
        assert mean == pytest.approx(1 + prior * (queue + 2 * m - 2), rel=1e-9)
        variance = (K - mean) ** 2 @ probability
        assert variance == pytest.approx(prior * (1 - prior) * (queue + 4 * (m - 1)), rel=1e-6, abs=1e-9)

    def test_equation_9_misses_the_own_key(self):
        """By 1 - q: nothing for the head, nearly everything for the tail of iNaturalist (2 of 437,513 images)."""
        for prior in (0.4, 2 / 437_513):
            K, probability = equations.positives_distribution(prior, 8192, 32)
            assert K @ probability - equations.expected_positives(prior, 8192, 32) == pytest.approx(1 - prior)
        tail = np.array([2 / 437_513])
        by_equation_9 = equations.optima_by_equation_9(tail, np.array([0.05]), 8192, 32)
        exact = equations.mean_optima(tail, np.array([0.05]), 8192, 32)
        assert by_equation_9.center_AC.item() == pytest.approx(0.998, abs=5e-4)
        assert exact.center_AC.item() == pytest.approx(0.951, abs=5e-4)
        assert by_equation_9.supcon_C.item() > 1 > exact.supcon_C.item()

    @pytest.mark.parametrize(("prior", "queue", "m"), [(0.0, 8, 2), (1.1, 8, 2), (0.5, -1, 2), (0.5, 8, 0)])
    def test_refuses_what_is_no_draw(self, prior, queue, m):
        """The message names the arguments."""
        with pytest.raises(ValueError, match="class_prior must be in"):
            equations.positives_distribution(prior, queue, m)


def test_mean_optima_are_what_sampled_batches_have():
    """Within 4 standard errors of 4,000 drawn queues and micro-batches, counted image by image."""
    rng = np.random.default_rng(0)
    prior, alphas = np.array([0.5, 0.38, 0.1, 0.02]), np.array([0.05, 0.3])
    mean = equations.mean_optima(prior, alphas, queue_length=40, micro_batch=4)
    for y in range(4):
        others, queue = (rng.choice(4, (4000, n), p=prior) == y for n in (3, 40))
        K = 1 + 2 * others.sum(1) + queue.sum(1)  # its own key, then query and key of each other image, then the queue
        for figure, sampled in (
            (mean.positives_C[y], K),
            (mean.supcon_C[y], 1 / K),
            *((mean.center_AC[a, y], 1 / (1 + alpha * K)) for a, alpha in enumerate(alphas)),
            *((mean.positive_AC[a, y], alpha / (1 + alpha * K)) for a, alpha in enumerate(alphas)),
        ):
            assert abs(figure - sampled.mean()) < 4 * sampled.std() / 4000**0.5
    # the mean of 1 / K is not 1 / mean K, nor is Eq. (9) the mean
    assert mean.supcon_C[3] > 1.1 / mean.positives_C[3]


class TestLongTail:
    """Class counts, from whatever is at hand."""

    def test_of_the_shipped_card(self):
        """Read from the label file, largest class first."""
        tail = theory.read_long_tail(SHIPPED_CARD)
        assert tail.counts_C.tolist() == [1000, 599, 359, 215, 129, 77, 46, 27, 16, 10]
        assert (tail.classes[0], tail.classes[-1]) == ("T-shirt/top", "Ankle boot")
        assert tail.shots == ("many",) * 5 + ("medium",) * 3 + ("few",) * 2
        assert tail.prior_C.sum() == pytest.approx(1)

    @pytest.mark.parametrize("name", ["", "manifest.json"])
    def test_of_built_shards(self, striped_shards, name):
        """From the manifest alone, named or by its directory; another split if asked for."""
        assert theory.read_long_tail(striped_shards / name).counts_C.tolist() == [80, 40, 20, 8]
        assert theory.read_long_tail(striped_shards, "test").counts_C.tolist() == [5, 5, 5, 5]
        with pytest.raises(ValueError, match="no split 'night'; its splits are: train, val, test"):
            theory.read_long_tail(striped_shards, "night")

    def test_of_annotations_without_their_images(self, inaturalist_card):
        """An iNaturalist card needs its JSON only; a class without images is left out and named."""
        tail = theory.read_long_tail(inaturalist_card)
        assert (tail.classes, tail.counts_C.tolist(), tail.empty) == (("owl", "elk"), [3, 1], ("yew",))

    def test_root_says_where_the_files_are(self, inaturalist_card, tmp_path):
        """As for building shards."""
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (inaturalist_card.parent / "train.json").rename(elsewhere / "train.json")
        assert theory.read_long_tail(inaturalist_card, root=elsewhere).counts_C.tolist() == [3, 1]

    def test_counts_that_are_not_at_hand_come_with_a_remedy(self, inaturalist_card):
        """The missing file, and both ways out."""
        (inaturalist_card.parent / "train.json").unlink()
        with pytest.raises(ValueError, match=r"train\.json is missing.*--root FOLDER.*directory of its built shards"):
            theory.read_long_tail(inaturalist_card)
        with pytest.raises(ValueError, match="no split 'val'; its splits are: train"):
            theory.read_long_tail(inaturalist_card, "val")


@pytest.fixture
def inaturalist_card(tmp_path: Path) -> Path:
    """A card and its annotations of four images that are not there."""
    page = {
        "categories": [{"id": 7, "name": "owl"}, {"id": 8, "name": "yew"}, {"id": 9, "name": "elk"}],
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(4)],
        "annotations": [{"image_id": i, "category_id": 9 if i == 2 else 7} for i in range(4)],
    }
    (tmp_path / "train.json").write_text(json.dumps(page))
    card = tmp_path / "card.yaml"
    card.write_text("name: wood\nlicense: none\nsource: inaturalist\nsplits: {train: {annotations: train.json}}\n")
    return card


class TestCommand:
    def test_prints_both_tables_and_draws_one_picture(self, capsys, tmp_path):
        """The optimum of each shot by both ways, the alphas with the one given, and a .png."""
        arguments = ["--alpha", ".03", "--queue", "256", "--micro-batch", "32", "--output", str(tmp_path / "page.png")]
        assert theory.main(["--card", str(SHIPPED_CARD), *arguments]) == 0
        lines = capsys.readouterr().out.splitlines()
        rows = {
            cells[1].strip(): [c.strip() for c in cells[2:-1]] for line in lines if len(cells := line.split("│")) > 2
        }
        tail = theory.read_long_tail(SHIPPED_CARD)
        exact = equations.mean_optima(tail.prior_C, np.array([0.03]), 256, 32)
        few = np.average(exact.center_AC[0, 8:], weights=[16, 10])
        assert rows["Few"][:2] == ["2", "16 - 10"]
        assert rows["Few"][8] == f"{few:.3g}"
        assert rows["0.03"][4] == f"{few:.3g}"
        assert rows["smallest"][5] == f"{1 / (10 / 2478 * 319):.3g}"
        assert float(rows["0.03"][0]) == pytest.approx(0.03 * (1 + 1000 / 2478 * 318), rel=0.01)
        assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")

    def test_a_folder_takes_a_picture_of_each(self, tmp_path, striped_shards):
        """Made if it is not there."""
        assert theory.main(["--card", str(striped_shards), "--queue", "80", "--output", str(tmp_path / "a" / "b")]) == 0
        assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["alpha.png", "optima.png"]

    def test_an_alpha_that_drowns_the_centers_is_said_with_its_remedy(self, capsys):
        """The suggested alpha and queue length give the published pull of 4.5."""
        tail = theory.read_long_tail(SHIPPED_CARD)
        assert theory.main(["--card", str(SHIPPED_CARD), "--alpha", ".05", "--queue", "8192"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "It is 4.5 with alpha 0.0014 and this queue, or with this alpha and a queue of 158." in said
        for alpha, queue in ((0.00135, 8192), (0.05, 158)):
            K = equations.mean_optima(tail.prior_C, np.array([alpha]), queue, 32).positives_C[0]
            assert alpha * K == pytest.approx(4.5, rel=0.02)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--card", "nowhere.yaml"], "no dataset card nowhere.yaml"),
            (["--card", str(SHIPPED_CARD), "--output", "page.pdf"], "neither a folder nor a .png"),
            (["--card", str(SHIPPED_CARD), "--alpha", "0"], "0 is not a number above 0"),
            (["--card", str(SHIPPED_CARD), "--queue", "-1"], "'-1' is no whole number of 0 or more"),
            (["--card", str(SHIPPED_CARD), "--micro-batch", "two"], "'two' is no whole number of 1 or more"),
        ],
    )
    def test_what_is_wrong_is_one_message(self, capsys, arguments, message):
        """Exit status 2, no traceback."""
        with pytest.raises(SystemExit) as ended:
            theory.main(arguments)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err

    def test_runs_as_a_module(self):
        """As the documentation has it."""
        run = subprocess.run(
            [sys.executable, "-m", "paco_ds.paper.theory", "--card", str(SHIPPED_CARD), "--queue", "256"],
            capture_output=True,
            text=True,
            check=False,
            cwd=SHIPPED_CARD.parents[1],
        )
        assert run.returncode == 0, run.stderr
        assert "Which alpha gives which p_c" in run.stdout
