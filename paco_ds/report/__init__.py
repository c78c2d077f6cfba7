"""The page of a run."""

from paco_ds.report.run_report import write_report

__all__ = ["write_report"]
