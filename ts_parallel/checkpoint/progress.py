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

    def __init__(self, label: str, is_shown: bool = True) -> None:
        self._label = label
        self._is_shown = is_shown
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
        elif self._is_shown and time.perf_counter() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.perf_counter()
            logger.info("%s: %d %%", self._label, 100 * self._done // max(1, self._total))
