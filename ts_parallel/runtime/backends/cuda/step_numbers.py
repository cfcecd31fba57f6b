"""A step plan as the numbers that a GPU needs of it: one row of int64, laid out on the host and copied once.

Steps in which every sequence adds one token are filled up to one of a few sizes, and their numbers lie where those of
the last such step lay: so a step can be recorded once for each size, and replayed. What fills them up has no keys,
writes nothing, and nobody reads its logits.

T tokens of the step, R rows whose logits are wanted, C chunks.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ts_parallel.runtime.backends.packed_plan import NUMBERS_A_CHUNK, pack
from ts_parallel.step_plan import StepPlan

STEP_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256)
"""Of how many sequences the steps are that are filled up; larger ones are run as they come."""

_COPIES_UNDER_WAY = 4  # numbers of so many steps are on their way to the device at most
_SPARE = 4096  # block ids beyond one for each block, as sequences may share some

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StepNumbers:
    """On the device, in one piece of memory."""

    token_ids: torch.Tensor  # [1, T]
    positions: torch.Tensor  # [1, T]
    sampled_rows: torch.Tensor  # [R]
    slots: torch.Tensor  # [T], where each token's key and value are written; -1: nowhere
    chunks: torch.Tensor  # [C × 4], as `PackedPlan` has them
    decodes: torch.Tensor  # the numbers of chunks of one token
    tiles: torch.Tensor  # [N × 2], the others' chunk and first token
    block_ids: torch.Tensor
    size: int | None
    """Of `STEP_SIZES`, where the step was filled up to it."""


class StepWriter:
    """Owns the memory of the steps' numbers, on the host and on the device."""

    def __init__(self, num_blocks: int, block_size: int, tokens_of_tile: int, device: torch.device) -> None:
        self._block_size = block_size
        self._tokens_of_tile = tokens_of_tile
        self._device = device
        self._is_pinned = device.type == "cuda"
        of_one = 4 + NUMBERS_A_CHUNK + 1  # token, position, slot, row; chunk; decode
        self._kept = torch.zeros(of_one * STEP_SIZES[-1] + num_blocks + _SPARE, dtype=torch.int64, device=device)
        self._on_their_way: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()

    def write(self, plan: StepPlan) -> StepNumbers:
        """The numbers of a plan, with one asynchronous copy."""
        packed = pack(plan)
        chunks: Integers = np.frombuffer(packed.chunks, np.int64).reshape(-1, NUMBERS_A_CHUNK)
        size = _size_of(plan)
        if size is not None:
            rows, own = np.arange(size), packed.positions.numpy()[0]
            slots = _filled(self._slots(chunks, own, packed.block_ids), size, -1)
            tokens, positions = _filled(packed.token_ids.numpy()[0], size, 0), _filled(own, size, 0)
            every = _filled_chunks(chunks, size)
            return self._send((tokens, positions, rows, slots, every, rows, _NONE, _of(packed.block_ids)), size)
        decodes = np.flatnonzero(chunks[:, 1] == 1)
        parts = (
            packed.token_ids.numpy()[0],
            packed.positions.numpy()[0],
            packed.sampled_rows.numpy(),
            self._slots(chunks, packed.positions.numpy()[0], packed.block_ids),
            chunks,
            decodes,
            self._tiles(chunks),
            _of(packed.block_ids),
        )
        return self._send(parts, None)

    def filling(self, size: int) -> StepNumbers:
        """Those of a step of `size` that has no sequence: to be recorded."""
        rows, nothing = np.arange(size), np.zeros(size, np.int64)
        chunks = _filled_chunks(np.empty((0, NUMBERS_A_CHUNK), np.int64), size)
        return self._send((nothing, nothing, rows, nothing - 1, chunks, rows, _NONE, _NONE), size)

    def _slots(self, chunks: Integers, positions: Integers, block_ids: array[int]) -> Integers:
        """Of every token, one chunk's behind the other's."""
        counts, first_blocks = chunks[:, 1], chunks[:, 3]
        blocks = _of(block_ids)[np.repeat(first_blocks, counts) + positions // self._block_size]
        slots: Integers = blocks * self._block_size + positions % self._block_size
        return slots

    def _tiles(self, chunks: Integers) -> Integers:
        """Chunk and first token of each tile of chunks of several tokens."""
        counts = np.where(chunks[:, 1] > 1, -(-chunks[:, 1] // self._tokens_of_tile), 0)
        numbers = np.repeat(np.arange(len(chunks)), counts)
        first = np.arange(len(numbers)) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.stack([numbers, first * self._tokens_of_tile], axis=1)

    def _send(self, parts: Sequence[Integers], size: int | None) -> StepNumbers:
        """`parts` in the order of their names here, to where they are kept if the step is of one of the sizes."""
        flat = [part.reshape(-1) for part in parts]
        total = sum(len(part) for part in flat)
        if total > len(self._kept):  # so many sequences share blocks that they are more than there is room for
            size = None
        host = self._host_memory(total)
        np.concatenate(flat, out=host.numpy()[:total])
        target = self._kept if size else torch.empty(total, dtype=torch.int64, device=self._device)
        target[:total].copy_(host[:total], non_blocking=True)
        if self._is_pinned:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._on_their_way.append((host, event))
        own = torch.split(target[:total], [len(part) for part in flat])
        tokens, positions, rows, slots, chunks, decodes, tiles, block_ids = own
        if size:
            block_ids = target[total - len(flat[-1]) :]  # as long in every step
        return StepNumbers(
            tokens.unsqueeze(0), positions.unsqueeze(0), rows, slots, chunks, decodes, tiles, block_ids, size
        )

    def _host_memory(self, total: int) -> torch.Tensor:
        """Of `total` numbers or more, which nobody reads any more."""
        if len(self._on_their_way) >= _COPIES_UNDER_WAY:
            host, event = self._on_their_way.popleft()
            event.synchronize()
            if len(host) >= total:
                return host
        return torch.empty(
            total + total // 2 if self._is_pinned else total, dtype=torch.int64, pin_memory=self._is_pinned
        )


_NONE = np.empty(0, np.int64)


def _size_of(plan: StepPlan) -> int | None:
    """Up to how many sequences a step is filled; None: it is run as it is."""
    chunks = plan.chunks
    if not 0 < len(chunks) <= STEP_SIZES[-1]:
        return None
    if any(len(chunk.token_ids) != 1 or not chunk.is_sampled or chunk.next_ids for chunk in chunks):
        return None
    return STEP_SIZES[bisect_left(STEP_SIZES, len(chunks))]


def _of(numbers: array[int]) -> Integers:
    return np.frombuffer(numbers, np.int64) if numbers else _NONE


def _filled(numbers: Integers, size: int, value: int) -> Integers:
    return np.concatenate([numbers, np.full(size - len(numbers), value, np.int64)])


def _filled_chunks(chunks: Integers, size: int) -> Integers:
    """Behind `chunks` such as have a token each, and no keys."""
    filling: Integers = np.zeros((size - len(chunks), NUMBERS_A_CHUNK), np.int64)
    filling[:, :3] = np.stack([np.arange(len(chunks), size), *np.full((2, len(filling)), [[1], [-1]])], axis=1)
    return np.concatenate([chunks, filling])
