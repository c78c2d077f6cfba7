"""Evaluation: exact counts over a split, and the metrics of long-tailed recognition."""
