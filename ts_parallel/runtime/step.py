"""What one step does: which tokens of which sequences run. Plain data, made by the scheduler, sent to every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. Greedy where `temperature` is 0."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Chunk:
    """The next tokens of one sequence: `token_ids` at positions `start`, `start + 1`, …

    `block_ids` are the KV blocks that hold the sequence up to and with this chunk. `is_sampled` says whether the chunk
    reaches the end of what is known, so that a next token is wanted.
    """

    request_id: str
    token_ids: tuple[int, ...]
    start: int
    block_ids: tuple[int, ...]
    is_sampled: bool
    sampling: SamplingParams = SamplingParams()

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True)
class StepPlan:
    """The chunks of one step. Without chunks it is a sign of life; `is_last` ends the ranks that follow."""

    chunks: tuple[Chunk, ...] = ()
    is_last: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)

    def encode(self) -> torch.Tensor:
        """int64 `[N]`, all that a rank needs which does not sample: `is_last`, then each chunk's counts and numbers."""
        numbers = [int(self.is_last)]
        for chunk in self.chunks:
            numbers += (len(chunk.token_ids), len(chunk.block_ids), chunk.start, int(chunk.is_sampled))
            numbers += chunk.token_ids
            numbers += chunk.block_ids
        return torch.tensor(numbers, dtype=torch.int64)

    @staticmethod
    def decode(numbers: Sequence[int]) -> StepPlan:
        chunks, at = [], 1
        while at < len(numbers):
            num_tokens, num_blocks, start, is_sampled = numbers[at : at + 4]
            blocks_at = at + 4 + num_tokens
            token_ids, at = tuple(numbers[at + 4 : blocks_at]), blocks_at + num_blocks
            chunks.append(Chunk("", token_ids, start, tuple(numbers[blocks_at:at]), bool(is_sampled)))
        return StepPlan(tuple(chunks), bool(numbers[0]))
