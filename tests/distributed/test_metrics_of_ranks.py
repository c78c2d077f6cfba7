"""Every rank serves its own /metrics while it trains."""

from prometheus_client.parser import text_string_to_metric_families

from tests.recipes import write_tiny_recipe


def test_every_ranks_metrics_can_be_fetched_and_parsed(pool, striped_shards, tmp_path):
    """Targets name all ranks; counters are those of the rank, positions those of the job."""
    recipe = tmp_path / "tiny.yaml"
    (tmp_path / "zero1.json").write_text('{"zero_optimization": {"stage": 1}}')
    write_tiny_recipe(recipe, f"data.shards={striped_shards}", "engine.deepspeed=zero1.json", "metrics.serve=true")
    pages = pool(2).run("tests.distributed.training:scrape_while_training", recipe=recipe, run=tmp_path / "run")[0]
    assert pages.keys() == {"0", "1"}
    for page in pages.values():
        samples = {
            (s.name, *s.labels.values()): s.value for f in text_string_to_metric_families(page) for s in f.samples
        }
        assert samples["paco_samples_total",] == 3 * 16
        assert samples["paco_step",] == 3
        assert 0 < samples["paco_loss",] < 20
        assert samples["paco_queue_fill_ratio",] == 1
        assert samples["paco_collective_bytes_total", "all_to_all"] > 0
        assert 0 < samples["paco_center_probability", "few"] < 1
        assert 0 < samples["paco_center_probability_optimum", "few"] <= 1
        assert 0 < samples["paco_positive_probability", "few"] < 1
        assert 0 < samples["paco_positive_probability_optimum", "few"] < 1
