"""One load on a server and what it took: a record of each request, and the figures that sum records up. No terminal.

The figures, in seconds, of the requests that were answered to their end:

- **TTFT**, time to first token: from before connecting until the first piece that brings a token was read.
- **ITL**, inter-token latency: the time between two pieces, divided by the tokens that the second one brings, and
  counted once for each of these tokens. A request's mean ITL is thus the time from its first piece to its last, divided
  by the tokens after the first piece.
- **gap**: the time between two pieces, counted once, however many tokens came: what a reader sees the text stand still.
- **E2E**, end to end: from before connecting until the answer's end was read.

A piece is an event that brings at least one token; those that were read at once came at the same moment. Its tokens are
counted by the server where it does that with each event (`stream_options.continuous_usage_stats`). Else they are
estimated: as equal shares of the answer's tokens among its pieces with text, or, where the server counts none, as one a
piece; each piece is then counted once in ITL.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ts_parallel.cli.client.stream_client import Piece, RemoteError
from ts_parallel.cli.client.workload import Ask

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Record:
    """What became of one request. Moments are seconds after the load's start."""

    ask: Ask
    sent: float
    ended: float
    moments: tuple[float, ...]  # at which its pieces came
    tokens: tuple[float, ...]  # of each piece
    is_counted: bool  # `tokens` are the server's own counts, not estimates
    num_prompt_tokens: int | None  # as the server counted them, where it did
    num_cached_tokens: int
    error: str | None  # why there is no whole answer

    @property
    def num_output_tokens(self) -> int:
        return round(sum(self.tokens))

    @property
    def ttft(self) -> float | None:
        return self.moments[0] - self.sent if self.moments else None

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.moments, self.moments[1:], strict=False)]

    @property
    def itls(self) -> list[float]:
        """See the module's text."""
        latencies = []
        for gap, count in zip(self.gaps, self.tokens[1:], strict=True):
            latencies += [gap / count] * (round(count) if self.is_counted else 1)
        return latencies

    @property
    def e2e(self) -> float:
        return self.ended - self.sent

    def as_dict(self) -> dict[str, Any]:
        return {
            "arrival_seconds": self.ask.arrival,
            "sent_seconds": self.sent,
            "asked_output_tokens": self.ask.num_output_tokens,
            "prompt_tokens": self.num_prompt_tokens,
            "cached_prompt_tokens": self.num_cached_tokens,
            "output_tokens": self.num_output_tokens,
            "ttft_seconds": self.ttft,
            "itl_seconds": self.itls,
            "gap_seconds": self.gaps,
            "e2e_seconds": self.e2e,
            "error": self.error,
        }


def follow(ask: Ask, pieces: Iterable[Piece], origin: float) -> Record:
    """Read one answer to its end or error, which is recorded. `origin` is the load's start on `perf_counter`."""
    sent = time.perf_counter() - origin
    seen: list[Piece] = []
    error = None
    try:
        seen.extend(pieces)
    except RemoteError as problem:
        error = str(problem)
    ended = time.perf_counter() - origin
    usage = next((piece.usage for piece in reversed(seen) if piece.usage is not None), None)
    moments, tokens, is_counted = _tokens_of_pieces(seen)
    return Record(
        ask,
        sent,
        ended,
        tuple(moment - origin for moment in moments),
        tuple(tokens),
        is_counted,
        usage.num_prompt_tokens if usage else None,
        usage.num_cached_tokens if usage else 0,
        error,
    )


def _tokens_of_pieces(events: Sequence[Piece]) -> tuple[list[float], list[float], bool]:
    """The moment and the tokens of each piece that brings any, and whether the server counted them one by one."""
    choices = [event for event in events if event.has_choice]
    counts = [event.usage.num_completion_tokens for event in choices if event.usage is not None]
    if len(counts) == len(choices):
        brought = [float(after - before) for before, after in zip([0, *counts], counts, strict=False)]
        pairs = [(event.moment, count) for event, count in zip(choices, brought, strict=True) if count > 0]
        return [moment for moment, _ in pairs], [count for _, count in pairs], True
    moments = [event.moment for event in choices if event.text]
    total = max((event.usage.num_completion_tokens for event in events if event.usage is not None), default=0)
    share = total / len(moments) if total and moments else 1.0
    return moments, [share] * len(moments), False


def run_load(asks: Sequence[Ask], limit: int, send: Callable[[Ask, float], Record]) -> Iterator[Record]:
    """Send each request when it arrives, at most `limit` at a time, and yield the records as the answers end.

    A request that finds no free connection waits for one. Closing the iterator lets nothing more be sent.

    Args:
        send: called with a request and the load's start on `perf_counter`, in one of `limit` threads.
    """
    origin = time.perf_counter()
    waiting = queue.SimpleQueue[Ask]()
    for ask in asks:
        waiting.put(ask)
    results = queue.SimpleQueue[Record | BaseException]()
    stop = threading.Event()

    def work() -> None:
        try:
            while not stop.is_set():
                ask = waiting.get_nowait()
                if not stop.wait(max(0.0, ask.arrival - (time.perf_counter() - origin))):
                    results.put(send(ask, origin))
        except queue.Empty:
            pass
        except BaseException as error:  # whoever waits for the record must hear of it, or waits forever
            results.put(error)

    try:
        for _ in range(min(limit, len(asks))):
            threading.Thread(target=work, daemon=True).start()  # a daemon, so that Ctrl-C waits for no answer
        for _ in asks:
            result = results.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        stop.set()


def summarize(records: Sequence[Record]) -> dict[str, Any]:
    """The figures of one load. Rates are of whole answers, over the time from the first sending to the last end."""
    good = [record for record in records if record.error is None]
    seconds = max(record.ended for record in records) - min(record.sent for record in records)
    num_output_tokens = sum(record.num_output_tokens for record in good)
    is_timed = any(record.ask.arrival for record in records)  # else each is sent when a connection is free
    return {
        "requests": len(records),
        "failed": len(records) - len(good),
        "seconds": seconds,
        "requests_per_second": len(good) / seconds,
        "output_tokens_per_second": num_output_tokens / seconds,
        "output_tokens": num_output_tokens,
        "prompt_tokens": sum(record.num_prompt_tokens or 0 for record in good),
        "cached_prompt_tokens": sum(record.num_cached_tokens for record in good),
        "tokens_are_estimated": not all(record.is_counted for record in good),
        "shorter_than_asked": sum(record.num_output_tokens < record.ask.num_output_tokens for record in good),
        "latest_sending_seconds": max(record.sent - record.ask.arrival for record in records) if is_timed else None,
        "metrics": {
            "ttft_seconds": spread_of([record.ttft for record in good if record.ttft is not None]),
            "itl_seconds": spread_of([latency for record in good for latency in record.itls]),
            "gap_seconds": spread_of([gap for record in good for gap in record.gaps]),
            "e2e_seconds": spread_of([record.e2e for record in good]),
        },
        "errors": dict(Counter(record.error for record in records if record.error is not None).most_common()),
    }


def spread_of(values: Sequence[float]) -> dict[str, float | int | None]:
    """Count, percentiles and mean; a percentile between two values is interpolated linearly, as numpy does."""
    if not values:
        return {"count": 0, **{f"p{percent}": None for percent in PERCENTILES}, "mean": None}
    percentiles = np.percentile(values, PERCENTILES)
    named = {f"p{percent}": float(value) for percent, value in zip(PERCENTILES, percentiles, strict=True)}
    return {"count": len(values), **named, "mean": float(np.mean(values))}
