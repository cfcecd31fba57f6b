"""A server that ends takes no more requests, and lets those finish that are open.

`ts-parallel serve` says that it begins by a file in a folder that its workers know by a variable. Each worker says
there by a file of its own, named by its process, how many requests it has open, as long as there are any: TorchServe
has no message for either, and a worker without requests hears nothing of it at all.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from ts_parallel.errors import DrainingError, RequestError

VARIABLE = "TS_PARALLEL_DRAIN_FOLDER"
BEGUN = "begun"
"""The file that says so."""
SECONDS_BETWEEN_LOOKS = 0.05
_ALWAYS_ANSWERED = ("metrics",)


class Draining:
    """What a worker knows of it, and tells."""

    def __init__(self, folder: Path | None = None) -> None:
        """
        Args:
            folder: None: the variable's; where that is not set either, the server ends without waiting.
        """
        named = os.environ.get(VARIABLE)
        self._folder = folder or (Path(named) if named else None)
        self._has_begun = False
        self._looked_at = -SECONDS_BETWEEN_LOOKS
        self._told = 0

    def refusal_of(self, route: str) -> RequestError | None:
        """Why a request that has come now is not answered; None where it is."""
        return DrainingError() if self._is_on() and route not in _ALWAYS_ANSWERED else None

    def tell(self, num_open: int) -> None:
        """So many requests are open; to be called again and again while there are some, and once there are none."""
        if self._folder is None or not self._is_on() or num_open == self._told:
            return
        file = self._folder / str(os.getpid())
        if num_open:
            file.write_text(str(num_open))
        else:
            file.unlink(missing_ok=True)
        self._told = num_open

    def _is_on(self) -> bool:
        if self._has_begun or self._folder is None:
            return self._has_begun
        now = time.monotonic()
        if now - self._looked_at >= SECONDS_BETWEEN_LOOKS:  # each look lets the interpreter go
            self._looked_at = now
            self._has_begun = (self._folder / BEGUN).exists()
        return self._has_begun


def begin(folder: Path) -> None:
    """From now on workers take no more requests."""
    folder.mkdir(exist_ok=True)
    (folder / BEGUN).touch()


def num_open(folder: Path) -> int:
    """Of all workers that are alive."""
    count = 0
    for file in folder.iterdir():
        if file.name == BEGUN or not Path("/proc", file.name).exists():
            continue
        try:
            count += int(file.read_text() or 1)  # between its making and its text it has none
        except FileNotFoundError:
            continue
    return count
