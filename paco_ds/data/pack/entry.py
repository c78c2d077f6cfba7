"""Entry point of `paco-build-shards`: hears Ctrl-C while libraries load."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from paco_ds.command import one_line_on_interrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    with one_line_on_interrupt():
        from paco_ds.data.pack import command
    return command.main(argv)


if __name__ == "__main__":
    sys.exit(main())
