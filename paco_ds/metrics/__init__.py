"""Monitoring of a run: Prometheus metrics, metrics.jsonl, and progress on the screen."""
