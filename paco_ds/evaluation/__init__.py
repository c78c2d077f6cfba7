"""Evaluation: exact counts over a split, and the figures long-tailed recognition is judged by."""
