"""What one step does: which tokens of which sequences run. Plain data, made by the scheduler, sent to every rank."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate, pairwise

import torch


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

    `block_ids` are the KV blocks that hold the sequence up to and with this chunk. `is_sampled` says whether the chunk
    reaches the end of what is known, so that a next token is wanted.
    """

    request_id: str
    token_ids: tuple[int, ...]
    start: int
    block_ids: tuple[int, ...]
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
    def num_results(self) -> int:
        """How many numbers the result is."""
        return sum(chunk.is_sampled + chunk.num_scores for chunk in self.chunks)

    def encode(self) -> torch.Tensor:
        """int64 `[N]`, all but the requests' names: two flags, how many of the numbers are words, then each chunk's
        counts, numbers and sampling, and at the end the words of all chunks, which never become Python's numbers."""
        words = [_words(chunk) for chunk in self.chunks]
        numbers = [int(self.is_last), int(self.wants_logits), sum(_num_words(part) for own in words for part in own)]
        for chunk, own in zip(self.chunks, words, strict=True):
            rows = (chunk.token_ids, chunk.block_ids, chunk.next_ids, _encode_sampling(chunk))
            numbers += (chunk.start, int(chunk.is_sampled), *map(_num_words, own), *map(len, rows))
            for row in rows:
                numbers += row
        encoded = bytearray(array("q", numbers))
        for own in words:
            for part in own:
                encoded += part
        return torch.frombuffer(encoded, dtype=torch.int64)

    @staticmethod
    def decode(encoded: torch.Tensor) -> StepPlan:
        """The plan of `encode`'s numbers; its chunks have no `request_id`."""
        after_chunks = len(encoded) - int(encoded[2])
        numbers: list[int] = encoded[:after_chunks].tolist()
        words = encoded[after_chunks:].numpy().tobytes()
        chunks, at, at_word = [], 3, 0
        while at < len(numbers):
            start, is_sampled, *lengths = numbers[at : at + _CHUNK_HEAD]
            word_ends = list(accumulate(lengths[:_NUM_WORDS_OF], initial=at_word))
            ends = list(accumulate(lengths[_NUM_WORDS_OF:], initial=at + _CHUNK_HEAD))
            prompt_ids, output_ids, allowed = (
                words[_BYTES_OF_WORD * first : _BYTES_OF_WORD * end] for first, end in pairwise(word_ends)
            )
            token_ids, block_ids, next_ids, sampling = (tuple(numbers[first:end]) for first, end in pairwise(ends))
            chunks.append(
                Chunk(
                    "",
                    token_ids,
                    start,
                    block_ids,
                    bool(is_sampled),
                    _decode_sampling(sampling),
                    prompt_ids,
                    output_ids,
                    next_ids,
                    allowed,
                )
            )
            at, at_word = ends[-1], word_ends[-1]
        return StepPlan(tuple(chunks), bool(numbers[0]), bool(numbers[1]))


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
            rows.append(TokenLogprobs(_reals(numbers[at:first])[0], tuple(zip(ids, _reals(bits), strict=True))))
            at = last
        results.append(tuple(rows))
    return results


_NUM_WORDS_OF = 3  # prompt, output and mask
_CHUNK_HEAD = 2 + _NUM_WORDS_OF + 4  # start, whether it is sampled, the lengths of these and of four rows
_BYTES_OF_WORD = 8
_DEFAULT = SamplingParams()
_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


def _words(chunk: Chunk) -> tuple[bytes, ...]:
    return chunk.prompt_ids, chunk.output_ids, chunk.allowed


def _num_words(words: bytes) -> int:
    """How many int64 numbers they are."""
    assert len(words) % _BYTES_OF_WORD == 0
    return len(words) // _BYTES_OF_WORD


def _encode_sampling(chunk: Chunk) -> tuple[int, ...]:
    """Nothing for the defaults; else the seed, which counts modulo 2**64, counts, and the bits of all that is real."""
    params = chunk.sampling
    if params == _DEFAULT:
        return ()
    token_ids = [token_id for token_id, _ in params.logit_bias]
    reals = [
        *(getattr(params, name) for name in _FLOATS),
        *(bias for _, bias in params.logit_bias),
    ]
    seed = (params.seed + 2**63) % 2**64 - 2**63
    num_logprobs = -1 if params.num_logprobs is None else params.num_logprobs
    return (seed, params.top_k, num_logprobs, *_bits(reals), *token_ids)


def _decode_sampling(numbers: Sequence[int]) -> SamplingParams:
    if not numbers:
        return _DEFAULT
    seed, top_k, num_logprobs = numbers[:3]
    num_biases = (len(numbers) - 3 - len(_FLOATS)) // 2
    reals = _reals(numbers[3 : len(numbers) - num_biases])
    biases = tuple(zip(numbers[len(numbers) - num_biases :], reals[len(_FLOATS) :], strict=True))
    named = dict(zip(_FLOATS, reals[: len(_FLOATS)], strict=True))
    return SamplingParams(
        seed=seed % 2**64,
        top_k=top_k,
        logit_bias=biases,
        num_logprobs=None if num_logprobs < 0 else num_logprobs,
        **named,
    )


def _bits(reals: Sequence[float]) -> tuple[int, ...]:
    return struct.unpack(f"<{len(reals)}q", struct.pack(f"<{len(reals)}d", *reals))


def _reals(bits: Sequence[int]) -> tuple[float, ...]:
    return struct.unpack(f"<{len(bits)}d", struct.pack(f"<{len(bits)}q", *bits))
