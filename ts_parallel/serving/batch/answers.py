"""What all requests for generated answers have: how long an answer may be, and its inputs beside the encoder's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig

from ts_parallel.errors import RequestError
from ts_parallel.partition.model.seq2seq import longest_answer
from ts_parallel.serving.batch.greedy import MOST_TOKENS, PROMPT


class AnswerLimits:
    """The most tokens of an answer: the request's, at most the deployment's and what the decoder has positions for."""

    def __init__(self, most: int | None, generation: GenerationConfig, config: PretrainedConfig) -> None:
        self._positions = longest_answer(config)
        self._most = most or self._positions
        self._generation = generation

    @property
    def longest_context(self) -> int:
        """The most tokens before a prompt, as Whisper has it."""
        return self._positions // 2 - 1

    def of(self, fields: Mapping[str, Any], prompt: Sequence[int]) -> int:
        """
        Raises:
            RequestError: the request asks for more, or for no number of tokens.
        """
        limit = min(self._most, self._positions - len(prompt))
        wanted = fields.get(MOST_TOKENS)
        if wanted is None:
            own = self._generation
            usual = own.max_new_tokens or (own.max_length and own.max_length - len(prompt)) or limit
            return max(1, min(limit, usual))
        if not isinstance(wanted, int) or isinstance(wanted, bool) or not 1 <= wanted <= limit:
            raise RequestError(f"{MOST_TOKENS!r} must be a number from 1 to {limit}, got {wanted!r}", MOST_TOKENS)
        return wanted

    def of_windows(self, fields: Mapping[str, Any], prompt: Sequence[int]) -> tuple[int, int]:
        """Of the first window's answer, and how far that may grow: for Whisper, `max_length` is without the prompt, and
        each window adds the prompt's length to it.

        Raises:
            RequestError: as `of`.
        """
        own, limit = self._generation, min(self._most, self._positions - len(prompt))
        if MOST_TOKENS in fields or own.max_new_tokens or not own.max_length:
            most = self.of(fields, prompt)
            return most, most
        longer = min(own.max_length + min(self.longest_context, len(prompt)), self._positions)
        return max(1, min(limit, longer - len(prompt))), max(1, limit)


def answer_inputs(prompt: Sequence[int], max_new_tokens: int) -> dict[str, torch.Tensor]:
    return {PROMPT: torch.tensor(prompt), MOST_TOKENS: torch.tensor(max_new_tokens)}


def numbers_field(value: Any, name: str) -> torch.Tensor:
    """
    Raises:
        RequestError: the field is no nested lists of numbers.
    """
    if not isinstance(value, list):
        raise RequestError(f"{name!r} must be nested lists of numbers, got {type(value).__name__}", name)
    try:
        return torch.tensor(value, dtype=torch.float32)
    except (ValueError, TypeError, RuntimeError) as error:
        raise RequestError(f"{name!r} must be nested lists of numbers: {error}", name) from None
