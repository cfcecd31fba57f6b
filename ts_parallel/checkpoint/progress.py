"""How far a load has come: a bar on a terminal, log lines otherwise, nothing on ranks other than 0."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Counts bytes of one load. Owns its bar."""

    def __init__(self, label: str, is_shown: bool = True, seconds_between_lines: float | None = None) -> None:
        self._label = label
        self._is_shown = is_shown
        self._seconds_between_lines = seconds_between_lines  # None: SECONDS_BETWEEN_LINES
        self._bar: tqdm[Any] | None = None
        self._done = self._total = 0
        self._start = self._last_line = 0.0

    @contextmanager
    def over(self, num_bytes: int) -> Iterator[None]:
        self._total, self._done = num_bytes, 0
        self._start = self._last_line = time.perf_counter()
        if self._is_shown and sys.stderr.isatty():
            self._bar = tqdm(total=num_bytes, unit="B", unit_scale=True, desc=self._label, leave=False)
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.close()
        if self._is_shown:
            seconds = time.perf_counter() - self._start
            logger.info("%s: %.1f MB in %.2f s", self._label, num_bytes / 1e6, seconds)

    def advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._bar is not None:
            self._bar.update(num_bytes)
        elif self._is_shown:
            self._log_now_and_then()

    def _log_now_and_then(self) -> None:
        now, pause = time.perf_counter(), self._seconds_between_lines
        if now - self._last_line > (SECONDS_BETWEEN_LINES if pause is None else pause):
            self._last_line = now
            percent = 100 * self._done // max(1, self._total)
            logger.info("%s: %d %% of %.1f MB in %.2f s", self._label, percent, self._total / 1e6, now - self._start)
