"""What a request changes of its logits before its next token is chosen: penalties, biases, and what is forbidden.

All rows of a step at once: what they have seen is joined and scattered. R rows, V vocabulary, N tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from ts_parallel.step_plan import Chunk, SamplingParams

_BITS_OF_WORD = 64
_BOUNDS = np.array([-np.inf, np.inf], dtype=np.float32)  # of what is forbidden, and of what is allowed


def adjust(logits: torch.Tensor, chunks: Sequence[Chunk]) -> None:
    """Change the logits `[R, V]`, float32, in place: penalties, then biases, then minus infinity where a token is not
    allowed. Tokens that have no logits, as a head may have fewer than the vocabulary, are passed over.

    Repetition: Keskar et al. 2019 (https://arxiv.org/abs/1909.05858); presence and frequency: OpenAI's API reference.
    """
    _penalise_repetition(logits, chunks)
    _penalise_presence(logits, chunks)
    _add_biases(logits, chunks)
    _forbid(logits, chunks)


def _penalise_repetition(logits: torch.Tensor, chunks: Sequence[Chunk]) -> None:
    penalties = [chunk.sampling.repetition_penalty for chunk in chunks]
    histories = [
        chunk.prompt_ids + chunk.output_ids if penalty != 1 else b""
        for chunk, penalty in zip(chunks, penalties, strict=True)
    ]
    if not any(histories):
        return
    rows, ids = _joined(histories, logits.shape[1])
    places = _tensors(logits, rows, ids)
    penalty = torch.from_numpy(np.array(penalties, dtype=np.float32)[rows]).to(logits.device)
    own = logits[places]
    logits[places] = torch.where(own > 0, own / penalty, own * penalty)  # a token that is there twice has one number


def _penalise_presence(logits: torch.Tensor, chunks: Sequence[Chunk]) -> None:
    settings = [chunk.sampling for chunk in chunks]
    histories = [
        chunk.output_ids if own.presence_penalty or own.frequency_penalty else b""
        for chunk, own in zip(chunks, settings, strict=True)
    ]
    if not any(histories):
        return
    num_tokens = logits.shape[1]
    rows, ids = _joined(histories, num_tokens)
    both, counts = np.unique(rows * num_tokens + ids, return_counts=True)
    rows, ids = np.divmod(both, num_tokens)
    presence = _column(settings, lambda own: own.presence_penalty)[rows]
    frequency = _column(settings, lambda own: own.frequency_penalty)[rows]
    taken = torch.from_numpy((presence + frequency * counts).astype(np.float32)).to(logits.device)
    places = _tensors(logits, rows, ids)
    logits[places] = logits[places] - taken


def _add_biases(logits: torch.Tensor, chunks: Sequence[Chunk]) -> None:
    biased = [
        (row, token_id, bias)
        for row, chunk in enumerate(chunks)
        for token_id, bias in chunk.sampling.logit_bias
        if token_id < logits.shape[1]
    ]
    if not biased:
        return
    rows, ids, biases = zip(*biased, strict=True)
    places = _tensors(logits, np.array(rows), np.array(ids))
    # One after the other where a token has several.
    added = torch.tensor(biases, dtype=torch.float32, device=logits.device)
    logits.index_put_(places, added, accumulate=True)


def _forbid(logits: torch.Tensor, chunks: Sequence[Chunk]) -> None:
    rows = [row for row, chunk in enumerate(chunks) if chunk.allowed]
    if not rows:
        return
    num_bytes = -(-logits.shape[1] // _BITS_OF_WORD) * (_BITS_OF_WORD // 8)
    masks = b"".join(chunks[row].allowed[:num_bytes].ljust(num_bytes, b"\0") for row in rows)
    bits = np.frombuffer(masks, dtype=np.uint8).reshape(len(rows), num_bytes)
    allowed = np.unpackbits(bits, axis=1, count=logits.shape[1], bitorder="little")
    # A bound, not a choice: which tokens are allowed cannot be foreseen, and a processor that tries loses time.
    bounds = torch.from_numpy(_BOUNDS[allowed]).to(logits.device)
    for row, own in zip(rows, bounds, strict=True):
        torch.minimum(logits[row], own, out=logits[row])


def _joined(histories: Sequence[bytes], num_tokens: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Row and id of each token of all histories, int64 `[N]`, of those below `num_tokens`."""
    ids = np.frombuffer(b"".join(histories), dtype=np.int64)
    rows = np.repeat(np.arange(len(histories)), [len(history) // ids.itemsize for history in histories])
    is_here = ids < num_tokens
    return rows[is_here], ids[is_here]


def _tensors(logits: torch.Tensor, *numbers: npt.NDArray[np.int64]) -> tuple[torch.Tensor, ...]:
    """On the logits' device."""
    return tuple(torch.from_numpy(own).to(logits.device) for own in numbers)


def _column(settings: Sequence[SamplingParams], read: Callable[[SamplingParams], float]) -> npt.NDArray[np.float64]:
    return np.array([read(own) for own in settings])
