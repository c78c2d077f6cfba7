"""Being asked to stop: by a scheduler's SIGTERM or by Ctrl-C."""

from __future__ import annotations

import signal


class StopRequest:
    """True once SIGTERM (preemption, a time limit) or Ctrl-C came; the step under way is finished first.

    A second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self.received = False
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}

    def _receive(self, number: int, frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True

    def __call__(self) -> bool:
        """True from the first signal on."""
        return self.received

    def close(self) -> None:
        """Handle signals as before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
