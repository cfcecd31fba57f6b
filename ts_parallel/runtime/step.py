"""What one step does: which tokens of which sequences run. Plain data, made by the scheduler, sent to every rank."""

from __future__ import annotations

import struct
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
    """The chunks of one step. Without chunks it is a sign of life; `is_last` ends the ranks that follow.

    A step's result is one token for each sampled chunk, or with `wants_logits` its logits.
    """

    chunks: tuple[Chunk, ...] = ()
    is_last: bool = False
    wants_logits: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)

    def encode(self) -> torch.Tensor:
        """int64 `[N]`, all but the requests' names: two flags, then each chunk's counts, sampling and numbers."""
        numbers = [int(self.is_last), int(self.wants_logits)]
        for chunk in self.chunks:
            numbers += (len(chunk.token_ids), len(chunk.block_ids), chunk.start, int(chunk.is_sampled))
            numbers += _encode_sampling(chunk.sampling)
            numbers += chunk.token_ids
            numbers += chunk.block_ids
        return torch.tensor(numbers, dtype=torch.int64)

    @staticmethod
    def decode(numbers: Sequence[int]) -> StepPlan:
        """The plan of `encode`'s numbers; its chunks have no `request_id`."""
        chunks, at = [], 2
        while at < len(numbers):
            num_tokens, num_blocks, start, is_sampled = numbers[at : at + 4]
            sampling = _decode_sampling(*numbers[at + 4 : at + 7])
            blocks_at = at + 7 + num_tokens
            token_ids, at = tuple(numbers[at + 7 : blocks_at]), blocks_at + num_blocks
            chunks.append(Chunk("", token_ids, start, tuple(numbers[blocks_at:at]), bool(is_sampled), sampling))
        return StepPlan(tuple(chunks), bool(numbers[0]), bool(numbers[1]))


def _encode_sampling(params: SamplingParams) -> tuple[int, int, int]:
    """The bits of the two floats, and the seed, which counts modulo 2**64, as int64s."""
    temperature, top_p = struct.unpack("<qq", struct.pack("<dd", params.temperature, params.top_p))
    return temperature, top_p, (params.seed + 2**63) % 2**64 - 2**63


def _decode_sampling(temperature: int, top_p: int, seed: int) -> SamplingParams:
    floats = struct.unpack("<dd", struct.pack("<qq", temperature, top_p))
    return SamplingParams(temperature=floats[0], top_p=floats[1], seed=seed % 2**64)
