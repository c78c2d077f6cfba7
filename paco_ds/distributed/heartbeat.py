"""Where this rank is in its run: marked by training, read by the watchdog's thread; nothing is sent."""

from __future__ import annotations

from dataclasses import dataclass

SLOW = 4  # times engine.hang_seconds for a start, a first step, a save, a report: as long as it takes


@dataclass(frozen=True)
class Mark:
    """What a rank does. All ranks set the same marks in the same order, so that the lowest `count` is the last rank.

    Attributes:
        patience: how many times `hang_seconds` it may take; 0: any time.
    """

    count: int
    phase: str
    step: int
    patience: int


class Heartbeat:
    """The last mark of this rank.

    Attributes:
        hang_seconds: how long a mark may stand before the rank counts as hung; None: for ever.
    """

    def __init__(self) -> None:
        self.hang_seconds: float | None = None
        self.last = Mark(0, "start", 0, patience=0)

    def mark(self, phase: str, step: int, slow: bool = False) -> None:
        """Progress: from now on this rank does `phase` of `step`. All ranks mark alike.

        Args:
            slow: it may take `SLOW` times as long as a step.
        """
        self.last = Mark(self.last.count + 1, phase, step, SLOW if slow else 1)
