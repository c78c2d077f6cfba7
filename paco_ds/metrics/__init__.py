"""What a run tells while it trains: Prometheus metrics, metrics.jsonl, and progress on the screen."""
