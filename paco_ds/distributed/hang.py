"""A hang: no rank makes progress, though all live. Which ranks the others wait for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from paco_ds.distributed.heartbeat import Heartbeat
from paco_ds.distributed.link import Message

ANSWER = 5.0  # seconds in which a rank that runs says where it is
_LONGEST_TICK = 2.0  # seconds


@dataclass(frozen=True)
class Place:
    """Where a rank is: its last mark, the seconds it has stood there, and whether these are too many."""

    count: int
    phase: str
    step: int
    seconds: int
    overdue: bool

    def message(self) -> Message:
        return asdict(self)

    @classmethod
    def of(cls, message: Message) -> Place:
        """The place that a rank sent.

        Raises:
            ValueError, LookupError: it is none.
        """
        count, step, seconds = (int(message[name]) for name in ("count", "step", "seconds"))
        return cls(count, str(message["phase"]), step, seconds, bool(message["overdue"]))

    def __str__(self) -> str:
        return f"step {self.step} ({self.phase})"


class Pace:
    """How long this rank has stood at its last mark, in time in which this process ran.

    A job that is suspended as a whole (Ctrl-Z, a scheduler, a virtual machine) does not hang: what passes between two
    ticks counts as two seconds at most.
    """

    def __init__(self, heartbeat: Heartbeat, now: float) -> None:
        self._heartbeat, self._mark = heartbeat, heartbeat.last
        self._ticked, self._stood = now, 0.0

    def tick(self, now: float) -> Place:
        """Where this rank is; called about once a second."""
        mark = self._heartbeat.last
        self._stood = 0.0 if mark is not self._mark else self._stood + min(now - self._ticked, _LONGEST_TICK)
        self._mark, self._ticked = mark, now
        allowed = self._heartbeat.allowed(mark)
        overdue = allowed is not None and self._stood > allowed
        return Place(mark.count, mark.phase, mark.step, int(self._stood), overdue)


@dataclass
class Inquiry:
    """Rank 0 asks all ranks where they are, since one of them has been at its mark for too long."""

    asked: Iterable[int]
    began: float
    places: dict[int, Place] = field(default_factory=dict)

    def late(self, now: float) -> list[int] | None:
        """The ranks that the others wait for; none if there is progress; None while answers are awaited.

        A rank that does not answer is late. If all answer, those at the lowest mark are, unless one of them may still
        stay there: a long save of one rank is no hang of those that wait for it.
        """
        silent = [rank for rank in self.asked if rank not in self.places]
        if silent and now - self.began < ANSWER:
            return None
        if not any(place.overdue for place in self.places.values()):
            return []
        if silent:
            return silent
        lowest = min(place.count for place in self.places.values())
        last = {rank: place for rank, place in self.places.items() if place.count == lowest}
        return sorted(last) if all(place.overdue for place in last.values()) else []


@dataclass(frozen=True)
class Hang:
    """No rank makes progress.

    Attributes:
        late: the ranks that the others wait for.
        places: of the ranks that say where they are.
    """

    late: Sequence[int]
    places: Mapping[int, Place]

    def describe(self, name: Callable[[list[int]], str], name_with_host: Callable[[list[int]], str]) -> str:
        """The late ranks with their hosts and where they are, then the others.

        Args:
            name, name_with_host: ranks in words, without and with their hosts.
        """
        silent = [rank for rank in self.late if rank not in self.places]
        said = [f"{name_with_host(silent)} gives no answer (stopped?)"] if silent else []
        for named, late in ((name_with_host, True), (name, False)):
            by_place: dict[str, list[int]] = {}
            for rank, place in sorted(self.places.items()):
                if (rank in self.late) == late:
                    by_place.setdefault(str(place), []).append(rank)
            said += [f"{named(ranks)} at {place}" for place, ranks in by_place.items()]
        seconds = max(place.seconds for place in self.places.values())
        return f"no progress for {seconds} s (engine.hang_seconds): {'; '.join(said)}"


class HangWatch:
    """A rank's part in finding a hang; used by the watchdog's thread alone.

    A rank that has stood at its mark for too long tells rank 0, which asks all where they are. If rank 0 does not
    react, each rank finds that rank 0 is the one that hangs.

    Args:
        tell: sends a message to all other ranks (rank 0), or to rank 0.
        others: the ranks at the other ends that have not left the job.
    """

    def __init__(
        self, rank: int, heartbeat: Heartbeat, tell: Callable[[Message], None], others: Callable[[], Iterable[int]]
    ) -> None:
        self._rank, self._tell, self._others = rank, tell, others
        self._pace = Pace(heartbeat, time.monotonic())
        self._inquiry: Inquiry | None = None  # of rank 0
        self._told = 0.0  # since when rank 0 has not reacted
        self._said_overdue = False  # in what this rank told last

    def tick(self, now: float) -> Hang | None:
        """The hang, once it is certain; called about once a second."""
        place = self._pace.tick(now)
        if self._rank == 0:
            if place.overdue:
                self._ask(now)
            return self._conclude(now, place)
        if not place.overdue:
            self._told = 0.0
            if self._said_overdue:  # it goes on after all
                self._tell_place(place)
        elif not self._told:
            self._told = now
            self._tell_place(place)
        elif now - self._told > 2 * ANSWER:
            return Hang([0] if 0 in self._others() else [self._rank], {self._rank: place})
        return None

    def hear(self, rank: int, message: Message, now: float) -> None:
        """Rank 0 asks where this rank is, or another rank says it to rank 0.

        Raises:
            ValueError, LookupError: neither.
        """
        if self._rank:
            self._told = 0.0
            self._tell_place(self._pace.tick(now))
            return
        place = Place.of(message)
        if place.overdue:
            self._ask(now)
        if self._inquiry is not None:
            self._inquiry.places[rank] = place

    def _tell_place(self, place: Place) -> None:
        self._said_overdue = place.overdue
        self._tell(place.message())

    def _ask(self, now: float) -> None:
        if self._inquiry is None:
            self._inquiry = Inquiry([0, *self._others()], now)
            self._tell({"where": True})

    def _conclude(self, now: float, place: Place) -> Hang | None:
        if self._inquiry is None:
            return None
        places = self._inquiry.places
        places[0] = place
        late = self._inquiry.late(now)
        if late is not None:
            self._inquiry = None
        return Hang(late, places) if late else None
