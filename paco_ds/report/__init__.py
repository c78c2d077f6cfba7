"""Pages made from the files of a run or of several: nothing here is needed to train."""

from paco_ds.report.comparison import MethodResults, SeedResult, verdicts, write_comparison
from paco_ds.report.run_report import write_report

__all__ = ["MethodResults", "SeedResult", "verdicts", "write_comparison", "write_report"]
