"""The leader's end of the channel to the other ranks. Knows numbers, not what they tell."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from ts_parallel.errors import EngineError


class NumberChannel(Protocol):
    def send_numbers(self, numbers: Sequence[int], rank: int) -> None: ...

    def flush(self) -> None: ...


class Leader:
    """Owns who may use the channel now, and whether the ranks are in step."""

    def __init__(self, channel: NumberChannel, world_size: int, on_error: Callable[[], None]) -> None:
        """
        Args:
            on_error: forgets what is in flight.
        """
        self._channel = channel
        self._world_size = world_size
        self._on_error = on_error
        self._lock = threading.Lock()
        self._num_results = 0
        self.is_broken = False
        """Whether an error has left the ranks out of step, so that nothing can be run any more."""

    @property
    def progress(self) -> int | None:
        """How many results have come, while the channel is in use; None while nobody waits for another rank."""
        return self._num_results if self._lock.locked() else None

    def count_result(self) -> None:
        self._num_results += 1

    def refuse_if_broken(self) -> None:
        """
        Raises:
            EngineError: an earlier run was broken off by an error, and other ranks wait for what will not come.
        """
        if self.is_broken:
            raise EngineError("the ranks are out of step since an earlier error")

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """The channel for oneself. An error inside leaves other ranks waiting for what will not come."""
        with self._lock:
            try:
                yield
            except BaseException:
                self.is_broken = self._world_size > 1
                self._on_error()
                raise

    def tell(self, numbers: Sequence[int]) -> None:
        """While `in_step`: send the numbers to all other ranks."""
        for rank in range(1, self._world_size):
            self._channel.send_numbers(numbers, rank)

    def tell_at_once(self, numbers: Sequence[int]) -> None:
        """From any thread; nothing where the ranks are out of step."""
        with self.in_step():
            if not self.is_broken:
                self.tell(numbers)
                self._channel.flush()

    def stop(self, numbers: Sequence[int]) -> None:
        """The last that the others are told, also where they are out of step."""
        with self._lock:
            self.tell(numbers)
            self._channel.flush()

    def sign_of_life(self) -> None:
        """From any thread: keep the other ranks patient, who take this one for dead after some silence."""
        self.tell_at_once([])
