"""A step plan as int64 numbers, as the leader sends it to the other ranks: of each sequence what they do not know yet.

Both ends remember the last chunk of each sequence. A row of the next one that begins with all of that chunk's row (the
blocks, the tokens before, how it is sampled) is sent as its new end; any other is sent whole. So plans are exact
whatever becomes of a sequence, and a preemption, blocks of the prefix cache or a name that comes again need no word of
their own. The size of a plan is that of its new tokens and blocks, and some numbers a sequence.

What must hold:

- A decoder is given all that its encoder has made, in that order. A channel keeps the order of plans, also where
  several are in flight, and all ranks begin together and knowing nothing.
- A sequence is named by its number, which the encoder alone gives and takes back. The first chunk of a sequence says
  that it is, for what the decoder knows under its number may be another's.
"""

from __future__ import annotations

import struct
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import accumulate, pairwise
from typing import TypeVar

import torch

from ts_parallel.step_plan import Chunk, SamplingParams, StepPlan, reals_of

# A sequence that so many plans with chunks were without is forgotten: it has ended, or waits for long.
PLANS_TO_FORGET = 64

_PLAN_HEAD = 3  # whether it is the last, whether it wants logits, how many of the numbers are words
_NUM_WORDS_OF = 3  # the tokens before, of prompt and output, and the mask
_CHUNK_HEAD = 3 + _NUM_WORDS_OF + 4  # the sequence's number, start, flags, and the lengths of these and of four rows
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

# A chunk's flags.
_IS_FIRST, _IS_SAMPLED, _KEEPS_BLOCKS, _KEEPS_PROMPT, _KEEPS_OUTPUT, _KEEPS_SAMPLING, _KEEPS_MASK = (
    1 << bit for bit in range(7)
)

_Row = TypeVar("_Row", bytes, Sequence[int])

_NOTHING = Chunk("", (), 0, (), False)  # before a sequence's first chunk


@dataclass
class _Sent:
    """A sequence as the others know it."""

    number: int
    last: Chunk = _NOTHING
    last_plan: int = 0


class PlanEncoder:
    """Makes numbers of plans. Owns the numbers of sequences, by their requests' names."""

    def __init__(self, *, with_choice: bool = True) -> None:
        """
        Args:
            with_choice: whether anybody who is sent these plans chooses tokens. Else how they are chosen is left out:
                `sampling`, `prompt_ids`, `output_ids` and `allowed`.
        """
        self._with_choice = with_choice
        self._sent: OrderedDict[str, _Sent] = OrderedDict()  # the one longest unused first
        self._free: list[int] = []  # a heap of numbers that were taken back
        self._num_plans = 0

    def encode(self, plan: StepPlan) -> torch.Tensor:
        """int64 `[N]`, all but the requests' names: two flags, how many of the numbers are words, then each chunk's
        counts and rows, and at the end the words of all chunks, which never become Python's numbers."""
        numbers, words = [int(plan.is_last), int(plan.wants_logits), 0], list[bytes]()
        self._num_plans += bool(plan.chunks)
        for chunk in plan.chunks:
            sent = self._find(chunk)
            flags, rows, own = _news(chunk, sent.last, with_choice=self._with_choice)
            numbers += (sent.number, chunk.start, flags, *map(_num_words, own), *map(len, rows))
            for row in rows:
                numbers += row
            words += own
            sent.last, sent.last_plan = chunk, self._num_plans
        self._forget()
        numbers[2] = sum(map(_num_words, words))
        encoded = bytearray(array("q", numbers))
        for part in words:
            encoded += part
        return torch.frombuffer(encoded, dtype=torch.int64)

    def _find(self, chunk: Chunk) -> _Sent:
        name = chunk.request_id
        if name in self._sent:
            self._sent.move_to_end(name)
        else:
            number = heappop(self._free) if self._free else len(self._sent)
            self._sent[name] = _Sent(number)
        return self._sent[name]

    def _forget(self) -> None:
        while self._sent and self._num_plans - next(iter(self._sent.values())).last_plan > PLANS_TO_FORGET:
            _, sent = self._sent.popitem(last=False)
            heappush(self._free, sent.number)


@dataclass
class _Known:
    """The last chunk of a sequence, as far as the next may begin with it."""

    block_ids: array[int] = field(default_factory=lambda: array("q"))
    prompt_ids: bytes = b""
    output_ids: bytes = b""
    sampling: SamplingParams = _DEFAULT
    allowed: bytes = b""


class PlanDecoder:
    """Makes plans of a `PlanEncoder`'s numbers. Owns what is known of each sequence."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}

    def decode(self, encoded: torch.Tensor) -> StepPlan:
        """The plan of `encode`'s numbers; its chunks have no `request_id`, and arrays of block ids."""
        after_chunks = len(encoded) - int(encoded[2])
        numbers: list[int] = encoded[:after_chunks].tolist()
        words = encoded[after_chunks:].numpy().tobytes()
        chunks, at, at_word = [], _PLAN_HEAD, 0
        while at < len(numbers):
            number, start, flags, *lengths = numbers[at : at + _CHUNK_HEAD]
            word_ends = list(accumulate(lengths[:_NUM_WORDS_OF], initial=at_word))
            ends = list(accumulate(lengths[_NUM_WORDS_OF:], initial=at + _CHUNK_HEAD))
            token_ids, next_ids, *rows = (tuple(numbers[first:end]) for first, end in pairwise(ends))
            own = [words[_BYTES_OF_WORD * first : _BYTES_OF_WORD * end] for first, end in pairwise(word_ends)]
            last = _Known() if flags & _IS_FIRST else self._known[number]
            known = self._known[number] = _grown(last, flags, rows, own)
            chunks.append(
                Chunk(
                    "",
                    token_ids,
                    start,
                    known.block_ids,
                    bool(flags & _IS_SAMPLED),
                    known.sampling,
                    known.prompt_ids,
                    known.output_ids,
                    next_ids,
                    known.allowed,
                )
            )
            at, at_word = ends[-1], word_ends[-1]
        return StepPlan(tuple(chunks), bool(numbers[0]), bool(numbers[1]))


def _news(
    chunk: Chunk, last: Chunk, *, with_choice: bool
) -> tuple[int, tuple[Sequence[int], ...], tuple[bytes, bytes, bytes]]:
    """The flags, four rows and three parts in words that make `chunk` of the last one of its sequence."""
    keeps_blocks, block_ids = _end(chunk.block_ids, last.block_ids)
    flags = _IS_FIRST * (last is _NOTHING) + _IS_SAMPLED * chunk.is_sampled + _KEEPS_BLOCKS * keeps_blocks
    if not with_choice:
        return flags, (chunk.token_ids, chunk.next_ids, block_ids, ()), (b"", b"", b"")
    keeps_prompt, prompt_ids = _end(chunk.prompt_ids, last.prompt_ids)
    keeps_output, output_ids = _end(chunk.output_ids, last.output_ids)
    keeps_sampling = chunk.sampling is last.sampling or chunk.sampling == last.sampling
    keeps_mask = chunk.allowed == last.allowed
    flags += _KEEPS_PROMPT * keeps_prompt + _KEEPS_OUTPUT * keeps_output
    flags += _KEEPS_SAMPLING * keeps_sampling + _KEEPS_MASK * keeps_mask
    sampling = () if keeps_sampling else _encode_sampling(chunk.sampling)
    rows = (chunk.token_ids, chunk.next_ids, block_ids, sampling)
    return flags, rows, (prompt_ids, output_ids, b"" if keeps_mask else chunk.allowed)


def _end(row: _Row, last: _Row) -> tuple[bool, _Row]:
    """Whether the row begins with the last one, and what it then has behind that; else all of it."""
    if row is last:
        return True, row[:0]
    keeps = len(last) > 0 and row[: len(last)] == last
    return keeps, row[len(last) :] if keeps else row


def _grown(last: _Known, flags: int, rows: Sequence[tuple[int, ...]], words: Sequence[bytes]) -> _Known:
    """What is known after `_news`. A chunk keeps its blocks, so they are copied, as memory."""
    block_ids, sampling = rows
    prompt_ids, output_ids, mask = words
    return _Known(
        last.block_ids + array("q", block_ids) if flags & _KEEPS_BLOCKS else array("q", block_ids),
        last.prompt_ids + prompt_ids if flags & _KEEPS_PROMPT else prompt_ids,
        last.output_ids + output_ids if flags & _KEEPS_OUTPUT else output_ids,
        last.sampling if flags & _KEEPS_SAMPLING else _decode_sampling(sampling),
        last.allowed if flags & _KEEPS_MASK else mask,
    )


def _num_words(words: bytes) -> int:
    """How many int64 numbers they are."""
    assert len(words) % _BYTES_OF_WORD == 0
    return len(words) // _BYTES_OF_WORD


def _encode_sampling(params: SamplingParams) -> tuple[int, ...]:
    """Nothing for the defaults; else the seed, which counts modulo 2**64, counts, and the bits of all that is real."""
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
    reals = reals_of(numbers[3 : len(numbers) - num_biases])
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
