"""Write RUN/report.html again from the files of a run, also of one that was stopped or is still training.

example:
  paco-report runs/inat
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from paco_ds.command import one_line_on_interrupt, report_user_errors, say
from paco_ds.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = _parser().parse_args(argv)
    with one_line_on_interrupt(), report_user_errors():
        for run in arguments.run:
            if not (run / "metrics.jsonl").is_file():
                raise UserError(f"{run} is not the run directory of a training: {run / 'metrics.jsonl'} is missing")
        from paco_ds.report.run_report import write_report  # libraries of pages: only who draws waits

        for run in arguments.run:
            say(f"report: {write_report(run, pictures=arguments.pictures)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="+", help="run directory of a training")
    parser.add_argument(
        "--no-pictures",
        dest="pictures",
        action="store_false",
        help="leave out the pictures of misclassified images, for a page that goes to others; for every page of a run: "
        "evaluation.pictures",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
