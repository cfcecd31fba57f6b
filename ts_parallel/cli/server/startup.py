"""What a start is at, for whoever waits for it: live lines on a terminal, elsewhere a plain line for each phase.

It knows the lines that ranks print while they load, and nothing of what the phases do.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

SECONDS_BETWEEN_LINES = 5.0
_LOADED = re.compile(
    r"loading stage (?P<stage>\d+), rank 0 of (?P<ranks>\d+): (?:(?P<percent>\d+) % of )?(?P<megabytes>[\d.]+) MB "
    r"in (?P<seconds>[\d.]+) s"
)
_RANK_STARTED = "Torch worker started"
_PHASES = ("starting the ranks", "loading the weights", "making ready to answer")


@dataclass(frozen=True)
class Loaded:
    """How much of the weights is in the ranks' memory, and how fast it came."""

    num_bytes: float
    total: float
    seconds: float

    def __str__(self) -> str:
        size = f"{self.total / 1e9:.2f} GB" if self.total >= 1e9 else f"{self.total / 1e6:.1f} MB"
        rate = f", {self.num_bytes / self.seconds / 1e9:.2f} GB/s" if self.seconds else ""
        return f"{self.num_bytes / max(self.total, 1):.0%} of {size}{rate}"


class Startup:
    """Told of each phase as it begins, and how far a load is. This one is silent."""

    def begin(self, phase: str) -> None: ...

    def advance(self, loaded: Loaded) -> None: ...


class PlainStartup(Startup):
    """A line for each phase with the seconds since the start; while a phase lasts, now and then one of its progress."""

    def __init__(self) -> None:
        self._start = self._last_line = time.monotonic()
        self._phase = ""

    def begin(self, phase: str) -> None:
        self._phase = phase
        self._print(phase)

    def advance(self, loaded: Loaded) -> None:
        is_whole = loaded.num_bytes >= loaded.total
        if is_whole or time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._print(f"{self._phase}: {loaded}")

    def _print(self, text: str) -> None:
        self._last_line = time.monotonic()
        print(f"{self._last_line - self._start:6.1f} s  {text}", file=sys.stderr, flush=True)


class LiveStartup(Startup):
    """A line for each phase that moves while it lasts, with a bar where it is known how far it is."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def begin(self, phase: str) -> None:
        self.end()
        self._task = self._progress.add_task(phase, total=None, detail="")

    def advance(self, loaded: Loaded) -> None:
        if self._task is not None:
            self._progress.update(self._task, total=loaded.total, completed=loaded.num_bytes, detail=str(loaded))

    def end(self) -> None:
        """The phase is over: its line stays as it is."""
        if self._task is not None:
            self._progress.update(self._task, total=1, completed=1)
            self._progress.stop_task(self._task)
            self._task = None


@contextmanager
def silent_startup() -> Iterator[Startup]:
    yield Startup()


@contextmanager
def shown_startup(is_plain: bool = False) -> Iterator[Startup]:
    """On standard error.

    Args:
        is_plain: no line may move, as others are printed meanwhile.
    """
    console = Console(stderr=True)
    if is_plain or not console.is_terminal or console.is_dumb_terminal:
        yield PlainStartup()
        return
    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=12),
        TextColumn("{task.fields[detail]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        live = LiveStartup(progress)
        yield live
        live.end()


class LogFollower:
    """Makes phases of the lines of TorchServe's log. Owns how far each stage's load is.

    Of the ranks that share a stage one tells, and all of them load alike.
    """

    def __init__(self, startup: Startup, num_stages: int) -> None:
        self._startup = startup
        self._num_stages = num_stages
        self._num_phases = 0
        self._loads: dict[int, Loaded] = {}
        self._whole: set[int] = set()

    def follow(self, line: str) -> None:
        if _RANK_STARTED in line:
            self._reach(1)
        elif match := _LOADED.search(line):
            self._reach(2)
            self._note(match)
            if len(self._whole) == self._num_stages:
                self._reach(3)

    def _note(self, match: re.Match[str]) -> None:
        stage, total = int(match["stage"]), float(match["megabytes"]) * 1e6 * int(match["ranks"])
        self._loads[stage] = Loaded(total * int(match["percent"] or 100) / 100, total, float(match["seconds"]))
        if match["percent"] is None:
            self._whole.add(stage)
        if self._num_phases == 2:
            loads = self._loads.values()
            # Stages that have not told yet are taken to be as large as the others.
            total = sum(each.total for each in loads) * max(1.0, self._num_stages / len(loads))
            seconds = max(each.seconds for each in loads)
            self._startup.advance(Loaded(sum(each.num_bytes for each in loads), total, seconds))

    def _reach(self, num_phases: int) -> None:
        """Once only, for ranks that end are started again."""
        if num_phases > self._num_phases:
            self._num_phases = num_phases
            self._startup.begin(_PHASES[num_phases - 1])
