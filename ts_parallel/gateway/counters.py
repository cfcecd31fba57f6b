"""The gateway's own figures, and the models' figures joined with them, as Prometheus text."""

from __future__ import annotations

import re
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)")
_PREFIX = "ts_parallel_gateway_"


class Answered(Protocol):
    """What is to be known of an answer."""

    status: int
    first_byte_at: float | None
    is_whole: bool


@dataclass
class _FirstBytes:
    counts: list[int] = field(default_factory=lambda: [0] * (len(_BOUNDS) + 1))
    total: float = 0.0


class Counters:
    """Owns how many requests came by which route, and how they ended."""

    def __init__(self) -> None:
        self._routes: dict[Any, str] = {}
        self._ended: Counter[tuple[str, str]] = Counter()
        self._num_open = 0
        self._first_bytes: dict[str, _FirstBytes] = {}

    def count_by_name(self, routes: Iterable[tuple[str, Any]]) -> None:
        """Paths as they stand in the table of routes, each with its endpoint. All others are counted together, for
        clients make them up."""
        for path, endpoint in routes:
            self._routes |= {endpoint: path} if "{" in path else {path: path}

    @contextmanager
    def open(self, scope: Mapping[str, Any], answer: Answered) -> Iterator[None]:
        """Inside, a request is open; on leaving it is counted. The router writes its endpoint into `scope`."""
        begin = time.monotonic()
        self._num_open += 1
        try:
            yield
        finally:
            self._num_open -= 1
            route = self._routes.get(scope["path"]) or self._routes.get(scope.get("endpoint"), "other")
            self._ended[route, str(answer.status) if answer.is_whole else "left"] += 1
            if answer.first_byte_at is not None:
                known = self._first_bytes.setdefault(route, _FirstBytes())
                seconds = answer.first_byte_at - begin
                known.counts[bisect_left(_BOUNDS, seconds)] += 1
                known.total += seconds

    def text(self) -> str:
        name = f"{_PREFIX}requests_total"
        lines = [
            f"# HELP {name} Requests that ended, by status; left: the client went before.",
            f"# TYPE {name} counter",
        ]
        lines += [f'{name}{{route="{route}",status="{how}"}} {count}' for (route, how), count in self._ended.items()]
        name = f"{_PREFIX}requests_open"
        lines += [
            f"# HELP {name} Requests that are being answered.",
            f"# TYPE {name} gauge",
            f"{name} {self._num_open}",
        ]
        name = f"{_PREFIX}first_byte_seconds"
        lines += [f"# HELP {name} From a request's head to its answer's first byte.", f"# TYPE {name} histogram"]
        for route, known in self._first_bytes.items():
            counts = list(accumulate(known.counts))
            for bound, count in zip([*map(str, _BOUNDS), "+Inf"], counts, strict=True):
                lines.append(f'{name}_bucket{{route="{route}",le="{bound}"}} {count}')
            lines.append(f'{name}_sum{{route="{route}"}} {round(known.total, 6)}')
            lines.append(f'{name}_count{{route="{route}"}} {counts[-1]}')
        return "\n".join(lines) + "\n"


def joined(texts: Sequence[str]) -> str:
    """Several texts as one: each family once, with the samples of all."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for text in texts:
        family = ""
        for line in text.splitlines():
            words = line.split(maxsplit=3)
            if line.startswith("# ") and len(words) >= 3 and words[1] in ("HELP", "TYPE"):
                family = words[2]
                known = heads.setdefault(family, [])
                if not any(own.split(maxsplit=3)[1] == words[1] for own in known):
                    known.append(line)
            elif found := _SAMPLE.match(line):
                if not family or not found[1].startswith(family):
                    family = found[1]
                samples.setdefault(family, []).append(line)
    families = dict.fromkeys((*heads, *samples))
    lines = [line for name in families for line in (*heads.get(name, ()), *samples.get(name, ()))]
    return "\n".join(lines) + "\n"
