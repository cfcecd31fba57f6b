"""Where a token lies in a step is not its position: a model that takes one for the other is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import FAMILIES

from ts_parallel.errors import PlanError
from ts_parallel.partition.model.causal_lm import trace_causal_lm
from ts_parallel.partition.model.deferred import build_deferred

Change = Callable[[torch.Tensor], torch.Tensor]
TABLE = torch.ones(2**21, 1)


def places(hidden: torch.Tensor) -> torch.Tensor:
    return torch.arange(hidden.shape[1], device=hidden.device)


WRONG: dict[str, Change] = {
    "scaled by its place": lambda hidden: hidden * places(hidden)[None, :, None],
    "scaled beyond a place": lambda hidden: hidden * (places(hidden) > 8)[None, :, None],
    "embedding of its place": lambda hidden: hidden + torch.nn.functional.embedding(places(hidden), TABLE),
    "looked up by its place": lambda hidden: hidden + TABLE[places(hidden)],
}
RIGHT: dict[str, Change] = {
    "sorted and put back": lambda hidden: hidden[:, places(hidden).flip(0)][:, places(hidden).flip(0)],
}


def trace_with(change: Change) -> None:
    """Trace a model whose last norm is given its input after `change`."""
    model = build_deferred(FAMILIES["llama"](num_hidden_layers=1), torch.float32)
    norm = model.model.norm.forward
    model.model.norm.forward = lambda hidden: norm(change(hidden))
    trace_causal_lm(model, num_calls=1)


@pytest.mark.parametrize("name", WRONG)
def test_model_that_computes_with_the_place_of_a_token_is_refused(name: str) -> None:
    with pytest.raises(PlanError, match=r"LlamaForCausalLM computes with a token's place .* in 'model\.norm'"):
        trace_with(WRONG[name])


@pytest.mark.parametrize("name", RIGHT)
def test_model_that_sorts_tokens_is_not_refused(name: str) -> None:
    trace_with(RIGHT[name])
