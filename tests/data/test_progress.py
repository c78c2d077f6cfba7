"""What a long command shows while it runs."""

import io

import pytest

from paco_ds.command import Screen
from paco_ds.data.pack import progress_bar as progress_module
from paco_ds.data.pack.progress_bar import ShardProgress


class Clock:
    """A time that the test moves."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """In the place of the module's time."""
    made = Clock()
    monkeypatch.setattr(progress_module, "time", made)
    return made


def test_line_has_rates_time_left_and_bad_images(clock: Clock) -> None:
    """Where no terminal shows a bar, every ten seconds; rates are of the last half minute."""
    out = io.StringIO()
    with ShardProgress(Screen(out, width=200), "building", 10_000, 800_000_000) as progress:
        clock.now += 10
        progress.add(1_000, 80_000_000, 2)
        assert out.getvalue() == ("building: 1,000 of 10,000 images, 100 images/s, 8 MB/s, 1:30 left, 2 bad\n")
        for _ in range(6):
            clock.now += 10
            progress.add(100, 8_000_000, 0)
    assert "1,600 of 10,000 images, 10 images/s, 1 MB/s" in out.getvalue().splitlines()[-1]


def test_memory_names_the_largest_worker() -> None:
    """As the kernel kept it."""
    progress = ShardProgress(Screen(quiet=True), "building", 1, 1)
    assert progress.memory().startswith("peak memory ")
    progress.note_peak(123_000_000)
    progress.note_peak(5_000_000)
    assert progress.memory().endswith("MB, 123 MB in the largest worker")
