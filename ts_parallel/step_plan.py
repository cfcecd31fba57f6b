"""What one step does: which tokens of which sequences run. Plain data, made by the scheduler, sent to every rank."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; the defaults change nothing. Greedy where `temperature` is 0.

    The names and meanings are vLLM's and transformers'. Penalties come first, then `logit_bias`, then temperature and,
    each on what the one before has left: top_k, top_p, min_p, typical_p.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    """Only so many of the most likely tokens; 0: all."""
    min_p: float = 0.0
    """Only tokens at least this times as likely as the most likely one."""
    typical_p: float = 1.0
    """Only the tokens whose surprise is nearest to the expected one, until they have this probability together."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that prompt or answer have, and multiplies negative ones."""
    presence_penalty: float = 0.0
    """Taken off the logit of each token that the answer has."""
    frequency_penalty: float = 0.0
    """Taken off it as often as the answer has the token."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """`(token id, what is added to its logit)`; minus infinity forbids a token."""
    num_logprobs: int | None = None
    """So many of the most likely tokens are reported beside the chosen one, each with its log-probability; None: not
    even that of the chosen one is computed."""

    @property
    def needs_history(self) -> bool:
        return (
            self.repetition_penalty,
            self.presence_penalty,
            self.frequency_penalty,
        ) != (1.0, 0.0, 0.0)

    @property
    def changes_logits(self) -> bool:
        return self.needs_history or bool(self.logit_bias)


@dataclass(frozen=True)
class Chunk:
    """The next tokens of one sequence: `token_ids` at positions `start`, `start + 1`, …

    `block_ids` are the KV blocks that hold the sequence up to and with this chunk: an `array("q")` where there are many
    chunks, for those are laid out and compared without a number of Python's. Nobody writes to it. `is_sampled` says
    whether the chunk reaches the end of what is known, so that a next token is wanted.
    """

    request_id: str
    token_ids: tuple[int, ...]
    start: int
    block_ids: Sequence[int]
    is_sampled: bool
    sampling: SamplingParams = SamplingParams()
    prompt_ids: bytes = b""
    output_ids: bytes = b""
    """All tokens up to now, where `sampling` needs them, as `pack` has them."""
    next_ids: tuple[int, ...] = ()
    """What follows the first tokens of the chunk, where log-probabilities of the prompt's own tokens are wanted."""
    allowed: bytes = b""
    """What the next token may be: one bit a token id, the lowest of the first byte first; int64 numbers in whole.
    Empty: anything."""

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)

    @property
    def num_rows(self) -> int:
        """Of how many of its tokens the logits are wanted: those before `next_ids`, then the last if it is sampled."""
        return len(self.next_ids) + self.is_sampled

    @property
    def num_scores(self) -> int:
        """How many int64 numbers its log-probabilities are."""
        return 0 if self.sampling.num_logprobs is None else self.num_rows * (1 + 2 * self.sampling.num_logprobs)


class NoToken(IntEnum):
    """What a step's result has in a token's place where none can be chosen."""

    NOT_A_NUMBER = -1
    """The logits hold NaN."""
    NOTHING_ALLOWED = -2
    """All logits are minus infinity, the model's own or by what is forbidden."""


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely one token was, and which tokens were the most likely in its place, the first the most.

    Natural logarithms of the softmax of the model's own logits in float32: temperature, penalties, bias and all other
    restrictions come later.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class StepPlan:
    """The chunks of one step. Without chunks it is a sign of life; `is_last` ends the ranks that follow.

    A step's result is int64 numbers: one token for each sampled chunk, or a `NoToken`, then what `read_logprobs` reads.
    Or, with `wants_logits`, the logits of the sampled chunks.
    """

    chunks: tuple[Chunk, ...] = ()
    is_last: bool = False
    wants_logits: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)

    @property
    def num_rows(self) -> int:
        """Of how many of its tokens the logits are wanted."""
        return sum(chunk.num_rows for chunk in self.chunks)

    @property
    def num_results(self) -> int:
        """How many numbers the result is."""
        return sum(chunk.is_sampled + chunk.num_scores for chunk in self.chunks)


def pack(token_ids: Iterable[int]) -> bytes:
    """Their int64 numbers one behind the other: a long history is read as it lies, and not token by token."""
    return array("q", token_ids).tobytes()


def read_logprobs(chunks: Sequence[Chunk], numbers: Sequence[int]) -> list[tuple[TokenLogprobs, ...]]:
    """Each chunk's, one for each of its rows, of a step's result without its tokens.

    A row is the bits of the token's log-probability, the most likely ids, and the bits of theirs.
    """
    results, at = [], 0
    for chunk in chunks:
        num_top = chunk.sampling.num_logprobs
        rows = []
        for _ in range(chunk.num_rows if num_top is not None else 0):
            first, last = at + 1, at + 1 + 2 * (num_top or 0)
            ids, bits = numbers[first : (first + last) // 2], numbers[(first + last) // 2 : last]
            rows.append(TokenLogprobs(reals_of(numbers[at:first])[0], tuple(zip(ids, reals_of(bits), strict=True))))
            at = last
        results.append(tuple(rows))
    return results


def reals_of(bits: Sequence[int]) -> tuple[float, ...]:
    """The float64 numbers whose bits these int64 numbers are."""
    return struct.unpack(f"<{len(bits)}d", struct.pack(f"<{len(bits)}q", *bits))
