"""Where a model calls its attention, found by running the deferred model once, without data.

transformers lets a registered function stand in for every attention call of a model. Ours hands each call to the
backend that is attached to the model: here one that takes notes, at run time the paged attention of one rank. A family
that does not go through the registered interface shows too few calls and is refused: it would answer wrongly.
Call sites are counted in call order, not by layer, for some families call twice in a layer. Experts are skipped on the
way: they call no attention, and some of their kernels cannot run without data.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from ts_parallel.errors import PlanError
from ts_parallel.partition.graph.trace import line_of
from ts_parallel.partition.program import AttentionSite

IMPLEMENTATION = "ts_parallel"
LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
_SKIPPED = "ts_parallel_skipped"
_ATTENTION_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class AttentionPattern:
    """Which earlier tokens a token sees: all of them, or the last `window` (itself included)."""

    window: int | None = None

    def __getitem__(self, _: object) -> AttentionPattern:
        return self  # some families slice their mask to the key length; the pattern has no length


def site_of_call(
    module_name: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: AttentionPattern = AttentionPattern(),
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> AttentionSite:
    """The site of one call; see `AttentionBackend.attend` for the arguments."""
    return AttentionSite(
        module_name=module_name,
        num_heads=int(query.shape[1]),
        num_kv_heads=int(key.shape[1]),
        head_dim=int(query.shape[3]),
        value_dim=int(value.shape[3]),
        window=pattern.window,
        scaling=int(query.shape[3]) ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        has_sinks=sinks is not None,
    )


class AttentionBackend(Protocol):
    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,  # [1, H, T, D]
        key: torch.Tensor,  # [1, KV, T, D]
        value: torch.Tensor,  # [1, KV, T, E]
        pattern: AttentionPattern,
        scaling: float,
        softcap: float | None,
        sinks: torch.Tensor | None,  # [H]
    ) -> torch.Tensor: ...  # [1, T, H, E]


def attach(model: nn.Module, backend: AttentionBackend) -> None:
    """Let every attention call of `model` go to `backend`."""
    for module in model.modules():
        module.attention_backend = backend  # type: ignore[assignment]


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The registered attention function; its signature is transformers'."""
    if not isinstance(attention_mask, AttentionPattern):
        raise PlanError(f"{type(module).__name__} builds an attention mask of its own; only causal masks can be paged")
    if is_causal is False:
        raise PlanError(f"{type(module).__name__} attends to later tokens; only causal models can be paged")
    pattern = attention_mask if sliding_window is None else AttentionPattern(sliding_window)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    backend: AttentionBackend = module.attention_backend  # type: ignore[assignment]
    return backend.attend(module, query, key, value, pattern, scale, softcap, s_aux), None


def _mask(mask_function: Callable[..., Any], local_size: int | None = None, **_: Any) -> AttentionPattern:
    """The registered mask function: reads the window out of what transformers would build a mask from."""
    parts = [mask_function, *_closure_functions(mask_function)]
    names = {part.__qualname__.split(".")[0] for part in parts}
    unknown = names - {"and_masks", "causal_mask_function", "sliding_window_overlay"}
    if unknown:
        raise PlanError(
            f"the attention mask {sorted(unknown)} cannot be paged; only causal and sliding-window masks can"
        )
    return AttentionPattern(local_size if "sliding_window_overlay" in names else None)


def _closure_functions(function: Callable[..., Any]) -> list[Callable[..., Any]]:
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    nested = [part for cell in cells if isinstance(cell, tuple) for part in cell]
    return [part for part in [*cells, *nested] if callable(part)]


def _skip_experts(module: nn.Module, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """The registered experts function of the walk alone; at run time the model's own implementation is back."""
    return torch.zeros_like(hidden_states)


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
ExpertsInterface.register(_SKIPPED, _skip_experts)


class NoteTaker:
    """Notes the shape of every attention call in `sites`, in call order, and answers with zeros."""

    def __init__(self, model: nn.Module) -> None:
        self.sites: list[AttentionSite] = []
        self._names = {module: name for name, module in model.named_modules()}

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
        """See `AttentionBackend`."""
        site = site_of_call(self._names[module], query, key, value, pattern, scaling, softcap, sinks)
        self.sites.append(site)
        return self._answer(query, key, value, sinks)

    def _answer(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])


def find_attention_sites(model: PreTrainedModel) -> tuple[AttentionSite, ...]:
    """Every attention call of one forward pass of the deferred `model`, in call order.

    Raises:
        PlanError: the model mixes tokens other than by attention, or its attention cannot be paged.
    """
    config = model.config.get_text_config()
    _refuse_other_mixers(model, config)
    notes = NoteTaker(model)
    attach(model, notes)
    _keep_rotary_frequencies(model)
    # Fake as well as on the meta device: transformers looks into no fake mask.
    try:
        with torch.no_grad(), _experts_skipped(model), FakeTensorMode(allow_non_fake_inputs=True):
            ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
            model(**forward_arguments(ids, ids))
    except PlanError as error:
        raise PlanError(f"{type(model).__name__} cannot be served: {error}") from None
    except Exception as error:
        if AttentionPattern.__name__ in str(error):
            raise PlanError(
                f"{type(model).__name__} cannot run without data: it computes with the attention mask itself"
                f"{line_of(error)}; only attention that goes through transformers' interface can be paged"
            ) from error
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if isinstance(error, DataDependentOutputException):
            reason = "it reads what a tensor holds"
        raise PlanError(f"{type(model).__name__} cannot run without data{line_of(error)}: {reason}") from error
    if len(notes.sites) < config.num_hidden_layers:
        raise PlanError(
            f"{type(model).__name__} sends {len(notes.sites)} attention calls through transformers' interface, "
            f"{config.num_hidden_layers} layers were expected: its own attention code cannot be paged"
        )
    return tuple(notes.sites)


def _keep_rotary_frequencies(model: PreTrainedModel) -> None:
    """Let frequencies that follow the longest sequence of a batch stay as they are up to the length where they begin to
    change. No longer sequence is served: see `RankProgram.changing_rope`."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if LENGTH_DEPENDENT_ROPE & set(kinds.values() if isinstance(kinds, dict) else [kinds]):
            module.forward = MethodType(inspect.unwrap(type(module).forward), module)


@contextmanager
def _experts_skipped(model: PreTrainedModel) -> Iterator[None]:
    before = model.get_experts_implementation()
    model.set_experts_implementation(_SKIPPED)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def forward_arguments(token_ids: torch.Tensor, positions: torch.Tensor) -> dict[str, Any]:
    """Arguments of a forward pass over T packed tokens, both `[1, T]`.

    The mask of ones carries no information: given one, transformers does not search the positions for sequence borders,
    which costs a pass over them and fails without data.
    """
    return {
        "input_ids": token_ids,
        "position_ids": positions,
        "attention_mask": torch.ones_like(token_ids),
        "use_cache": False,
    }


def _refuse_other_mixers(model: PreTrainedModel, config: PretrainedConfig) -> None:
    layer_types = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYER_TYPES
    if layer_types:
        raise PlanError(f"{type(model).__name__} has layers of type {sorted(layer_types)}; only attention can be paged")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d):
            raise PlanError(
                f"{type(model).__name__} mixes tokens by convolution in {name!r}; only attention can be paged"
            )
