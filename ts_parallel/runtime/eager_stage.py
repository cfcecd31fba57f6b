"""The model's own modules in place of a traced stage: slower, and a way to find out whether a trace is at fault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ts_parallel.partition.model.attention_sites import AttentionPattern, attach
from ts_parallel.partition.model.causal_lm import call_causal_lm
from ts_parallel.partition.program import Crossing
from ts_parallel.runtime.backends.base import Attention


class EagerStage:
    """Runs a whole causal language model, as `Stage` does one stage. Owns the call count of a step."""

    received: tuple[Crossing, ...] = ()

    def __init__(self, model: Any, attention: Attention) -> None:
        self._model = model
        self._attention = attention
        self._step: Any = None
        self._site = 0
        attach(model, self)

    def __call__(
        self, step: Any, inputs: Mapping[str, torch.Tensor], received: Sequence[torch.Tensor] = ()
    ) -> list[torch.Tensor]:
        self._step, self._site = step, 0
        return [call_causal_lm(self._model, inputs)]

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pattern: AttentionPattern,
        scaling: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `AttentionBackend`. What the site is like was noted before; here its number counts."""
        assert self._step is not None
        self._site += 1
        return self._attention(self._step, query, key, value, self._site - 1)
