"""report.html of a run, and its charts."""

from paco_ds.report.run_report import write_report

__all__ = ["write_report"]
