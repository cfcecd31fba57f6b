"""What the engine has done and how long it took, in plain numbers. Knows nobody who reads them.

All moments are those of `time.perf_counter()`, in seconds.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from ts_parallel.engine.request import FinishReason, Request

# Why a request ended, beside its finish reasons: nobody wanted it any more, it could not go on, or its time was over.
ABORTED, FAILED, TIMED_OUT = "abort", "error", "timeout"
REASONS = (*get_args(FinishReason), ABORTED, FAILED, TIMED_OUT)

# Upper bounds of what is counted together, in seconds: fine where tokens come, coarse where requests wait.
_BOUNDS_OF_TOKENS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_BOUNDS_OF_REQUESTS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Histogram:
    """Owns how many values fell between which bounds, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """
        Args:
            bounds: the upper ends, each still within; the last group, above them all, has none.
        """
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass(frozen=True)
class Occupancy:
    """What is there at one moment."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    """Of all KV blocks, the part that some request holds: from 0 to 1. What is only remembered is free."""


@dataclass(frozen=True)
class KVBlocks:
    """What the KV memory is divided into, which stays."""

    number: int
    size: int
    """Token slots of each."""
    caches_prefixes: bool


class EngineStats:
    """Owns the counts, which only grow. The engine's thread writes them; others may read, and see single steps late."""

    def __init__(self) -> None:
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.num_preemptions = 0
        self.num_prefix_queries = 0
        """Prompt tokens of admitted requests, of which `num_prefix_hits` were computed already."""
        self.num_prefix_hits = 0
        self.num_ended: Counter[str] = Counter()
        """By one of `REASONS`."""
        self.time_to_first_token = Histogram(_BOUNDS_OF_REQUESTS)
        self.inter_token_latency = Histogram(_BOUNDS_OF_TOKENS)
        self.queue_time = Histogram(_BOUNDS_OF_REQUESTS)
        self.e2e_latency = Histogram(_BOUNDS_OF_REQUESTS)
        self._last_token: dict[Request, float] = {}

    def admitted(self, request: Request, num_cached: int) -> None:
        """It runs for the first time, and begins with `num_cached` tokens that need not be computed."""
        self.queue_time.add(time.perf_counter() - request.arrived)
        self.num_prompt_tokens += len(request.prompt_ids)
        self.num_prefix_queries += len(request.prompt_ids)
        self.num_prefix_hits += num_cached

    def preempted(self) -> None:
        self.num_preemptions += 1

    def token(self, request: Request, now: float) -> None:
        """It has got one more token."""
        self.num_generation_tokens += 1
        last = self._last_token.get(request)
        if last is None:
            self.time_to_first_token.add(now - request.arrived)
        else:
            self.inter_token_latency.add(now - last)
        self._last_token[request] = now

    def ended(self, request: Request, reason: str) -> None:
        """It has its last token, or was ended before."""
        assert reason in REASONS
        self._last_token.pop(request, None)
        self.num_ended[reason] += 1
        if reason in get_args(FinishReason):
            self.e2e_latency.add(time.perf_counter() - request.arrived)


@dataclass(frozen=True)
class Figures:
    """All that is known of an engine now."""

    stats: EngineStats
    occupancy: Occupancy
    kv_blocks: KVBlocks
