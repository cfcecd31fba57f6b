"""The kernels choose the tokens of a step: see `native/operations/sampling.h`, and what each parameter does in torch's
`sampling`, whose tokens these are."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from struct import Struct

import torch

from ts_parallel.native import kernels_for
from ts_parallel.runtime.backends.native.norms import is_for_kernels
from ts_parallel.runtime.backends.torch import sampling as plain
from ts_parallel.step_plan import Chunk, pack

# `struct sampled_row`: row, top_k, position, seed; six reals; where what a row brings begins among all rows' words.
_ROW = Struct("<3qQ6d7q")
_NO_WORDS = (0,) * 7
_BYTES_OF_WORD = 8


def sample(logits: torch.Tensor, chunks: Sequence[Chunk]) -> list[int]:
    """One token id a row of `[R, V]`, or why there is none (`NoToken`)."""
    kernels = kernels_for(logits.dtype)
    if kernels is None or not is_for_kernels(logits):
        return plain.sample(logits, chunks)
    tokens = array("q", bytes(_BYTES_OF_WORD * len(logits)))
    if all(map(plain.is_plain, chunks)):
        kernels.argmax(logits.data_ptr(), len(logits), logits.shape[1], tokens.buffer_info()[0])
        return tokens.tolist()
    rows: list[bytes] = []
    words: list[bytes] = []
    typical: list[int] = []
    num_words = 0
    for row, chunk in enumerate(chunks):
        params = chunk.sampling
        places, own = _words_of(chunk, num_words) if params.changes_logits or chunk.allowed else (_NO_WORDS, b"")
        rows.append(
            _ROW.pack(
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
                *places,
            )
        )
        if own:
            words.append(own)
            num_words += len(own) // _BYTES_OF_WORD
        if params.typical_p < 1 and params.temperature:
            typical.append(row)
    kernels.sample(logits.data_ptr(), logits.shape[1], tokens.buffer_info()[0], b"".join(rows), b"".join(words))
    # Typical tokens are those of one row in the order of their surprise, which no kernel has.
    if typical:
        for row, token in zip(typical, plain.sample(logits[typical], [chunks[row] for row in typical]), strict=True):
            tokens[row] = token
    return tokens.tolist()


def _words_of(chunk: Chunk, first: int) -> tuple[tuple[int, ...], bytes]:
    """History, biases and mask one behind the other, and where each begins and how long it is, if `first` is where the
    first does."""
    params = chunk.sampling
    history = chunk.prompt_ids + chunk.output_ids if params.needs_history else b""
    num_prompt = len(chunk.prompt_ids) // _BYTES_OF_WORD if history else 0
    num_output = len(history) // _BYTES_OF_WORD - num_prompt
    biases = first + num_prompt + num_output
    num_biases = len(params.logit_bias)
    words = history + chunk.allowed
    if num_biases:
        ids = pack(token_id for token_id, _ in params.logit_bias)
        words = history + ids + array("d", [bias for _, bias in params.logit_bias]).tobytes() + chunk.allowed
    mask, num_words = biases + 2 * num_biases, len(chunk.allowed) // _BYTES_OF_WORD
    return (first, num_prompt, num_output, biases, num_biases, mask, num_words), words
