"""llama.cpp by its own C interface, greedy: `python -m peers.programs.llamacpp FILE.gguf`.

All streams are sequences of one batch, each with a part of the KV cache to itself. numpy fills the batch and chooses
the tokens, so that nearly all of the time is llama.cpp's.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import llama_cpp  # type: ignore[import-not-found]
import numpy as np

from peers.rounds import OUTPUT_TOKENS, PROMPT_TOKENS, Answer, batches, serve_rounds

_TOKENS_OF_A_SEQUENCE = 256  # what a part of the KV cache is rounded up to anyway
_TOKENS_OF_A_BATCH = 512
assert PROMPT_TOKENS + OUTPUT_TOKENS <= _TOKENS_OF_A_SEQUENCE


class Sequences:
    """A context for `count` sequences, and the batch that is written anew for each step."""

    def __init__(self, model: Any, vocabulary: int, count: int) -> None:
        num_threads = len(os.sched_getaffinity(0))
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = count * _TOKENS_OF_A_SEQUENCE
        parameters.n_batch = parameters.n_ubatch = _TOKENS_OF_A_BATCH
        parameters.n_seq_max = count
        parameters.n_threads = parameters.n_threads_batch = num_threads
        parameters.kv_unified = False
        self._context = llama_cpp.llama_init_from_model(model, parameters)
        assert self._context, f"llama.cpp made no context for {count} sequences"
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocabulary = vocabulary
        self._batch = batch = llama_cpp.llama_batch_init(_TOKENS_OF_A_BATCH, 0, 1)
        shape = (_TOKENS_OF_A_BATCH,)
        self._tokens = np.ctypeslib.as_array(batch.token, shape)
        self._positions = np.ctypeslib.as_array(batch.pos, shape)
        self._wants_logits = np.ctypeslib.as_array(batch.logits, shape)
        np.ctypeslib.as_array(batch.n_seq_id, shape)[:] = 1

    def forget(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, False)

    def decode(self, tokens: np.ndarray, start: int, first: int) -> np.ndarray:
        """Run `tokens` `[sequences, length]`, of the sequences from `first` on, at positions from `start` on.

        Returns:
            each one's next token `[sequences]`.
        """
        count, length = tokens.shape
        size = count * length
        self._tokens[:size] = tokens.ravel()
        self._positions[:size] = np.tile(np.arange(start, start + length), count)
        for index in range(size):
            self._batch.seq_id[index][0] = first + index // length
        self._wants_logits[:size] = 0
        self._wants_logits[length - 1 : size : length] = 1
        self._batch.n_tokens = size
        status = llama_cpp.llama_decode(self._context, self._batch)
        assert status == 0, f"llama_decode gave {status}"
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (count, self._vocabulary))
        tokens_chosen: np.ndarray = logits.argmax(axis=1)
        return tokens_chosen


class LlamaCpp:
    """Owns the model, and a context for each number of streams that was asked for."""

    def __init__(self, file: str) -> None:
        llama_cpp.llama_backend_init()
        started = time.perf_counter()
        self._model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        assert self._model, f"llama.cpp could not load {file}"
        self.about = {"version": llama_cpp.__version__, "load_seconds": time.perf_counter() - started}
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._contexts: dict[int, Sequences] = {}

    def answer(self, prompts: list[list[int]], streams: int, num_tokens: int) -> list[Answer]:
        if streams not in self._contexts:
            self._contexts[streams] = Sequences(self._model, self._vocabulary, streams)
        sequences = self._contexts[streams]
        return [answer for batch in batches(prompts, streams) for answer in _answer_batch(sequences, batch, num_tokens)]


def _answer_batch(sequences: Sequences, prompts: list[list[int]], num_tokens: int) -> list[Answer]:
    """Prompts first, as many at once as a batch holds; then a token of every sequence in each step."""
    sequences.forget()
    at_once = _TOKENS_OF_A_BATCH // PROMPT_TOKENS
    firsts, moments = [], []
    for begin in range(0, len(prompts), at_once):
        tokens = sequences.decode(np.array(prompts[begin : begin + at_once], np.int32), 0, begin)
        firsts.append(tokens)
        moments += [[time.perf_counter()] for _ in tokens]
    columns = [np.concatenate(firsts)]
    for step in range(num_tokens - 1):
        columns.append(sequences.decode(columns[-1][:, None], PROMPT_TOKENS + step, 0))
        now = time.perf_counter()
        for own in moments:
            own.append(now)
    rows = np.stack(columns, axis=1).tolist()
    return [Answer(row, own) for row, own in zip(rows, moments, strict=True)]


if __name__ == "__main__":
    serve_rounds(lambda: LlamaCpp(sys.argv[1]))
