"""The kernels choose the tokens of a step: see `native/operations/sampling.h`, and what each parameter does in torch's
`sampling`, whose tokens these are."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from struct import Struct

import torch

from ts_parallel.native import kernels
from ts_parallel.runtime.backends.native.norms import is_for_kernels
from ts_parallel.runtime.backends.torch import sampling as plain
from ts_parallel.step_plan import Chunk, pack

# `struct sampled_row`: row, top_k, position, seed; six reals; where what a row brings begins among all rows' words.
_ROW = Struct("<3qQ6d7q")
_BYTES_OF_WORD = 8


def sample(logits: torch.Tensor, chunks: Sequence[Chunk]) -> list[int]:
    """One token id a row of `[R, V]`, or why there is none (`NoToken`)."""
    if not is_for_kernels(logits):
        return plain.sample(logits, chunks)
    tokens = array("q", bytes(_BYTES_OF_WORD * len(logits)))
    if all(map(plain.is_plain, chunks)):
        kernels.argmax(logits.data_ptr(), len(logits), logits.shape[1], tokens.buffer_info()[0])
        return tokens.tolist()
    rows: list[bytes] = []
    words: list[bytes] = []
    num_words = 0
    for row, chunk in enumerate(chunks):
        own = _words_of(chunk)
        rows.append(_pack_row(row, chunk, num_words))
        words += own
        num_words += sum(map(len, own)) // _BYTES_OF_WORD
    kernels.sample(logits.data_ptr(), logits.shape[1], tokens.buffer_info()[0], b"".join(rows), b"".join(words))
    # Typical tokens are those of one row in the order of their surprise, which no kernel has.
    typical = [row for row, chunk in enumerate(chunks) if chunk.sampling.temperature and chunk.sampling.typical_p < 1]
    if typical:
        for row, token in zip(typical, plain.sample(logits[typical], [chunks[row] for row in typical]), strict=True):
            tokens[row] = token
    return tokens.tolist()


def _words_of(chunk: Chunk) -> tuple[bytes, ...]:
    """History, biases and mask."""
    if not chunk.sampling.changes_logits:
        return (chunk.allowed,)
    biases = chunk.sampling.logit_bias
    amounts = array("d", [bias for _, bias in biases]).tobytes()
    return chunk.prompt_ids, chunk.output_ids, pack(token_id for token_id, _ in biases), amounts, chunk.allowed


def _pack_row(row: int, chunk: Chunk, first_word: int) -> bytes:
    params = chunk.sampling
    num_prompt = num_output = num_biases = 0
    if params.changes_logits:
        num_prompt, num_output = (len(own) // _BYTES_OF_WORD for own in (chunk.prompt_ids, chunk.output_ids))
        num_biases = len(params.logit_bias)
    biases = first_word + num_prompt + num_output
    return _ROW.pack(
        row,
        params.top_k,
        chunk.end,
        params.seed % 2**64,
        params.temperature,
        params.top_p,
        params.min_p,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
        first_word,
        num_prompt,
        num_output,
        biases,
        num_biases,
        biases + 2 * num_biases,
        len(chunk.allowed) // _BYTES_OF_WORD,
    )
