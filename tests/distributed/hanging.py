"""What the ranks of a pool run in the tests of hangs: a training under a watchdog, in which one rank is stopped."""

from __future__ import annotations

import io
import os
import signal
import threading
from contextlib import redirect_stderr
from pathlib import Path
from unittest.mock import patch

from paco_ds.config.load import load_recipe
from paco_ds.distributed import hang, watchdog
from paco_ds.distributed.launch import free_port
from paco_ds.distributed.ranks import ByteCounter, Ranks
from paco_ds.distributed.watchdog import RankWatchdog
from paco_ds.training.step_result import StepResult
from paco_ds.training.trainer import Trainer


def train_until_stopped(ranks: Ranks, recipe: Path, run: Path, stopped: int, after: int) -> tuple[int, str]:
    """Train for `after` + 2 steps. Before the last two rank `stopped` is sent SIGSTOP, and SIGCONT once the watchdog
    of another rank would have ended its process. Returns the status of that end, and what the watchdog said."""
    pids = ranks.gather_objects(os.getpid())
    port = ranks.gather_objects(free_port())[0]
    ends, said = [], io.StringIO()

    finished = threading.Event()

    def go_on() -> None:
        while not finished.wait(0.2):  # on a busy machine it may come before the stop
            os.kill(pids[stopped], signal.SIGCONT)

    def end(status: int) -> None:
        ends.append(status)
        threading.Thread(target=go_on, daemon=True).start()

    with (
        patch.dict(os.environ, MASTER_PORT=port),
        patch.multiple(watchdog, SETTLE=0.1, GRACE=0.1),
        patch.object(hang, "ANSWER", 2.0),
        redirect_stderr(said),
        RankWatchdog(end=end) as watching,
    ):
        trainer = Trainer(load_recipe(recipe), run, ranks, stop_at_step=after + 2, heartbeat=watching.heartbeat)
        take_step = trainer.train_step

        def step_then_stop() -> StepResult:
            result = take_step()
            if trainer.steps_done == after:
                watching.heartbeat.hang_seconds = trainer.recipe.engine.hang_seconds
                if ranks.rank == stopped:
                    os.kill(os.getpid(), signal.SIGSTOP)
            return result

        trainer.train_step = step_then_stop
        try:
            trainer.run()
        finally:
            finished.set()
            trainer.close()
            trainer.engine.destroy()
            ranks.on_bytes = ByteCounter()
    return ends[0] if ends else 0, said.getvalue()
