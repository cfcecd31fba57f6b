"""Who holds which KV block, and which blocks hold what is already computed.

A full block is remembered by its *content*: a number that stands for the tokens of the block and the content before it.
So equal content means equal tokens from the start on; nothing is left to a hash. A block that nobody holds keeps its
content until it is given away again, the one longest unused first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from itertools import count

from ts_parallel.engine.request import Request

_NOTHING = 0  # the content before the first block

_Key = tuple[int, tuple[int, ...]]  # content before, own tokens


class BlockManager:
    """Owns the block ids and their contents. The memory behind them lives in the runner."""

    def __init__(self, num_blocks: int, block_size: int, *, caches_prefixes: bool = True) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.caches_prefixes = caches_prefixes
        self._num_holders = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # next to be given away first
        self._numbers = count(_NOTHING + 1)
        self._contents: dict[_Key, tuple[int, int]] = {}  # → content, a block that has it
        self._of_block: dict[int, tuple[_Key, int]] = {}  # → what the block has

    @property
    def num_free(self) -> int:
        """How many blocks nobody holds, whatever they remember."""
        return len(self._free)

    def num_free_without(self, others: Sequence[Request]) -> int:
        """How many blocks nobody would hold, had `others` given back theirs."""
        return len(self._free) + len(self._given_back(others))

    def num_missing(self, request: Request, num_tokens: int) -> int:
        """How many blocks `request` lacks for its first `num_tokens` tokens; below 0 where it has more."""
        return -(-num_tokens // self.block_size) - len(request.block_ids)

    def can_hold(self, request: Request, num_tokens: int) -> bool:
        """Whether `request` can be given blocks for its first `num_tokens` tokens."""
        return self.num_missing(request, num_tokens) <= len(self._free)

    def hold(self, request: Request, num_tokens: int) -> None:
        """Give `request` the blocks it lacks for its first `num_tokens` tokens."""
        for _ in range(self.num_missing(request, num_tokens)):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._num_holders[block] = 1
            request.block_ids.append(block)

    def find_prefix(self, request: Request) -> list[int]:
        """The blocks that hold the longest computed start of `request`; at least one token is left to compute."""
        if request.has_prompt_to_score:
            return []
        blocks, content = [], _NOTHING
        for end in range(self.block_size, request.num_tokens, self.block_size):
            found = self._contents.get((content, request.token_ids(end - self.block_size, end)))
            if found is None:
                break
            content, block = found
            blocks.append(block)
        return blocks

    def can_admit(self, request: Request, prefix: list[int], others: Sequence[Request] = ()) -> bool:
        """Whether `request`, which has no blocks, can hold all its tokens if it begins with the blocks `prefix`, and
        `others` give back theirs."""
        given_back = self._given_back(others)
        num_free = len(self._free) + len(given_back)
        num_taken = sum(block in self._free or block in given_back for block in prefix)
        return self.num_missing(request, request.num_tokens) - len(prefix) <= num_free - num_taken

    def take_prefix(self, request: Request, prefix: list[int]) -> int:
        """Let `request` hold `prefix` too; how many tokens that is."""
        for block in prefix:
            self._free.pop(block, None)
            self._num_holders[block] += 1
            request.block_ids.append(block)
        request.num_remembered = len(prefix)
        return len(prefix) * self.block_size

    def remember(self, request: Request) -> None:
        """Note the content of the blocks that `request.num_scheduled` tokens have filled."""
        if not self.caches_prefixes:
            return
        while (request.num_remembered + 1) * self.block_size <= request.num_scheduled:
            index = request.num_remembered
            before = self._of_block[request.block_ids[index - 1]][1] if index else _NOTHING
            key = (
                before,
                request.token_ids(index * self.block_size, (index + 1) * self.block_size),
            )
            block = request.block_ids[index]
            if key in self._contents:  # computed twice, side by side; one of the two is enough to find it
                self._of_block[block] = (key, self._contents[key][0])
            else:
                self._contents[key] = (next(self._numbers), block)
                self._of_block[block] = (key, self._contents[key][0])
            request.num_remembered += 1

    def forget(self, request: Request) -> None:
        """Let nobody begin with what `request` alone has computed: it may be NaN. Those who hold it too find out."""
        for block in request.block_ids:
            if self._num_holders[block] == 1:
                self._forget(block)

    def release(self, request: Request) -> None:
        """Take back all blocks of `request`; those that others hold too stay theirs.

        The last blocks are given away before the first, which more requests may begin with.
        """
        for block in reversed(request.block_ids):
            assert self._num_holders[block] > 0, f"block {block} is free already"
            self._num_holders[block] -= 1
            if self._num_holders[block] == 0:
                self._free[block] = None
                if block not in self._of_block:
                    self._free.move_to_end(block, last=False)
        del request.block_ids[:]
        request.num_remembered = 0

    def _given_back(self, others: Sequence[Request]) -> set[int]:
        """The blocks that nobody but `others` holds."""
        held = Counter(block for other in others for block in other.block_ids)
        return {block for block, num_holders in held.items() if num_holders == self._num_holders[block]}

    def _forget(self, block: int) -> None:
        key, _ = self._of_block.pop(block, (None, None))
        if key is not None and self._contents.get(key, (None, None))[1] == block:
            del self._contents[key]
