"""A rank that answers no more ends its worker, so that no client waits for ever: TorchServe starts another.

Rank 0 waits for the others inside C or torch.distributed, where nothing reaches it: so a thread of its own looks how
long a step takes. A rank that is stopped (SIGSTOP, a debugger) keeps its memory and takes no signal but SIGKILL, which
TorchServe sends to torchrun alone: so who ends the worker kills the other ranks first. Where rank 0 is the one that is
stuck, the ranks that follow lose patience with it (`Topology.patience`) and end the worker likewise.

Slow is not stuck: ranks that wait on a CPU sleep, so as long as some rank computes and none is stopped, a step has ten
times as long. A long prompt of a large model on few cores must not end the worker that computes it. (On a GPU a wait
may look like work: there a rank that hangs has ten times as long too.)
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Protocol

import psutil

from ts_parallel.serving.torchserve.front_end import exit_now
from ts_parallel.topology import PATIENCE, Topology

logger = logging.getLogger(__name__)

# What is done at the first step only (memory and caches, a GPU's libraries) may take longer than the step.
TIMES_AS_LONG_AT_FIRST = 3
TIMES_AS_LONG_AT_WORK = 10
# Of a core, since the last look. Less is what a process that waits does beside it, on a machine as full as may be.
# Rank 0 reads and answers requests meanwhile, which is no step: it has to be busier.
_LEAST_SHARE_AT_WORK, _LEAST_SHARE_OF_RANK_0 = 0.1, 0.5
_LOOKS_A_STEP, _SECONDS_BETWEEN_LOOKS_AT_LEAST = 20, 0.05
_STOPPED, _GONE = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP), "gone"


class Steps(Protocol):
    @property
    def progress(self) -> int | None:
        """How many steps are done, while the result of another is waited for; None while none is."""
        ...


def patience_beside(max_step_seconds: float) -> timedelta:
    """How long ranks wait for each other: longer than rank 0 lets any step take, so that it is rank 0 which says what
    was stuck, and gives a sign of life after it."""
    return max(PATIENCE, timedelta(seconds=(TIMES_AS_LONG_AT_WORK + 1) * max_step_seconds))


class StepTimer:
    """Owns how long the present step has taken, as far as somebody looked: what this process has slept through itself,
    as when a whole machine is stopped for a while, does not count."""

    def __init__(self, max_seconds: float) -> None:
        self._max_seconds = max_seconds
        self._progress: int | None = None
        self._seconds = 0.0
        self.seconds_between_looks = max(max_seconds / _LOOKS_A_STEP, _SECONDS_BETWEEN_LOOKS_AT_LEAST)

    def limit(self) -> float:
        """Of the present step."""
        return self._max_seconds * (1 if self._progress else TIMES_AS_LONG_AT_FIRST)

    def is_late(self, progress: int | None, elapsed: float) -> bool:
        """Whether the present step takes longer than it may.

        Args:
            progress: as of `Steps`.
            elapsed: seconds since the last look.
        """
        if progress is None or progress != self._progress:
            self._progress, self._seconds = progress, 0.0
        else:
            self._seconds += min(elapsed, 2 * self.seconds_between_looks)
        return self._seconds > self.limit()

    @property
    def is_hopeless(self) -> bool:
        """Whether not even a rank that computes may take so long."""
        return self._seconds > self._max_seconds * TIMES_AS_LONG_AT_WORK


class Work:
    """Owns what the ranks of a host had computed when somebody last looked."""

    SECONDS_BETWEEN_LOOKS = 1.0  # the system counts in hundredths

    def __init__(self, ranks: Sequence[psutil.Process]) -> None:
        self._ranks = ranks
        own = os.getpid()
        self._shares = [_LEAST_SHARE_OF_RANK_0 if rank.pid == own else _LEAST_SHARE_AT_WORK for rank in ranks]
        self._seen = time.monotonic()
        self._spent = [_cpu_seconds(rank) for rank in ranks]
        self._goes_on = False

    def goes_on(self, now: float) -> bool:
        """Whether some rank has computed of late, and none is stopped or gone."""
        if now - self._seen >= self.SECONDS_BETWEEN_LOOKS:
            spent = [_cpu_seconds(rank) for rank in self._ranks]
            computed = [after - before for after, before in zip(spent, self._spent, strict=True)]
            least = [share * (now - self._seen) for share in self._shares]
            self._goes_on = any(own > bound for own, bound in zip(computed, least, strict=True))
            self._seen, self._spent = now, spent
        return self._goes_on and not {_state(rank) for rank in self._ranks} & {*_STOPPED, _GONE}


class RankWatch:
    """One rank's way to end its worker. Knows the processes of the worker's `other_ranks`, by rank."""

    def __init__(
        self,
        other_ranks: Mapping[int, psutil.Process],
        max_step_seconds: float,
        exit_worker: Callable[[], object] = exit_now,
    ) -> None:
        self._other_ranks = other_ranks
        self._max_step_seconds = max_step_seconds
        self._exit_worker = exit_worker
        self._tell: Callable[[str], object] = lambda _: None

    def begin(self, steps: Steps, tell: Callable[[str], object] | None = None) -> None:
        """Rank 0: end the worker once a step takes longer than it may. A rank alone waits for nobody.

        Args:
            tell: tells all clients in flight why the worker ends, and returns once that is on its way.
        """
        self._tell = tell or self._tell
        if self._other_ranks:
            threading.Thread(target=self._watch, args=(steps,), name="rank watch", daemon=True).start()

    def begin_with_leader(self) -> None:
        """A rank that follows: end the worker once rank 0, on the same host, was stopped for as long as a step may
        take. While it computes or waits for requests, its signs of life are enough."""
        if (leader := self._other_ranks.get(0)) is not None:
            threading.Thread(target=self._watch_leader, args=(leader,), name="rank watch", daemon=True).start()

    def end_worker(self, reason: str = "another rank was lost") -> None:
        """Kill the other ranks, tell the clients, then exit. psutil kills no later process of the same number."""
        for process in self._other_ranks.values():
            with suppress(psutil.Error):
                process.kill()
        self._tell(reason)
        self._exit_worker()

    def _watch(self, steps: Steps) -> None:
        timer, before = StepTimer(self._max_step_seconds), time.monotonic()
        work = Work([psutil.Process(), *self._other_ranks.values()])
        while True:
            time.sleep(timer.seconds_between_looks)
            now = time.monotonic()
            is_late, goes_on = timer.is_late(steps.progress, now - before), work.goes_on(now)
            if is_late and (timer.is_hopeless or not goes_on):
                break
            before = now
        what = f"a step has taken longer than {timer.limit():g} s: {self._describe()}"
        logger.error("%s; the worker ends (handler key 'max_step_seconds': %g)", what, self._max_step_seconds)
        self.end_worker(what)

    def _watch_leader(self, leader: psutil.Process) -> None:
        timer, before = StepTimer(self._max_step_seconds), time.monotonic()
        while True:
            time.sleep(timer.seconds_between_looks)
            now = time.monotonic()
            if timer.is_late(1 if _state(leader) in _STOPPED else None, now - before):
                break
            before = now
        logger.error(
            "rank 0 (process %d) was stopped for %g s; the worker ends (handler key 'max_step_seconds': %g)",
            leader.pid,
            timer.limit(),
            self._max_step_seconds,
        )
        self.end_worker()

    def _describe(self) -> str:
        """What the other ranks do: those that are stopped, or all where none is."""
        states = {rank: _state(process) for rank, process in self._other_ranks.items()}
        named = [rank for rank, state in states.items() if state in _STOPPED] or list(states)
        return ", ".join(f"rank {rank} (process {self._other_ranks[rank].pid}) is {states[rank]}" for rank in named)


def _state(process: psutil.Process) -> str:
    try:
        return process.status() if process.is_running() else _GONE
    except psutil.Error:
        return _GONE


def _cpu_seconds(process: psutil.Process) -> float:
    """What it has computed so far, all its threads together; 0 where it is gone."""
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def other_ranks(topology: Topology) -> dict[int, psutil.Process]:
    """The processes of the other ranks, as far as they are on this host. Every rank must call it.

    torchrun starts the ranks of a host: any other process whose number a rank elsewhere has is none of its children.
    """
    places = topology.gather((topology.host, os.getpid()))
    siblings = {(topology.host, process.pid): process for process in psutil.Process(os.getppid()).children()}
    return {rank: siblings[own] for rank, own in enumerate(places) if rank != topology.rank and own in siblings}


def kill_stopped_siblings() -> None:
    """Of a rank that ends for a reason of its own: torchrun's signal does not reach those that are stopped."""
    if os.environ.get("LOCAL_WORLD_SIZE", "1") == "1":
        return  # no torchrun: its siblings are anybody's
    with suppress(psutil.Error):
        for process in psutil.Process(os.getppid()).children():
            if process.pid != os.getpid() and _state(process) in _STOPPED:
                process.kill()
