"""Who holds which KV block."""

from __future__ import annotations

from collections import deque

from ts_parallel.engine.request import Request


class BlockManager:
    """Owns the block ids. The memory behind them lives in the runner."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._free = deque(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def num_missing(self, request: Request, num_tokens: int) -> int:
        """How many blocks `request` lacks for its first `num_tokens` tokens; below 0 where it has more."""
        return -(-num_tokens // self.block_size) - len(request.block_ids)

    def can_hold(self, request: Request, num_tokens: int) -> bool:
        """Whether `request` can be given blocks for its first `num_tokens` tokens."""
        return self.num_missing(request, num_tokens) <= len(self._free)

    def hold(self, request: Request, num_tokens: int) -> None:
        """Give `request` the blocks it lacks for its first `num_tokens` tokens."""
        for _ in range(self.num_missing(request, num_tokens)):
            request.block_ids.append(self._free.popleft())

    def release(self, request: Request) -> None:
        """Take back all blocks of `request`."""
        self._free.extend(request.block_ids)
        request.block_ids.clear()
