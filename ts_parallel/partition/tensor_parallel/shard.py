"""A plan applied to a deferred model: parameters shrink to this rank's shapes, a few modules learn to add or gather.

The model's own code stays as it is and knows one device: a sharded linear is still the linear it was, with fewer
features; an attention module is told how many heads it has left.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ts_parallel.checkpoint.stored import Slice
from ts_parallel.partition.program import AttentionSite, TensorParallelPlan
from ts_parallel.topology import TensorParallelGroup

Forward = Callable[..., torch.Tensor]

_GROUPED_ROW_BYTES = 16  # rows of grouped_mm's operands begin at multiples of this
_QUERY_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KEY_VALUE_HEAD_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_QUERY_WIDTHS = ("hidden_size", "embed_dim", "split_size", "all_head_size")


def apply_tensor_parallel(model: PreTrainedModel, plan: TensorParallelPlan, group: TensorParallelGroup) -> None:
    """Turn the deferred `model` into rank `group.rank`'s part of it, in place, still deferred."""
    _shrink_parameters(model, plan, group.rank)
    _choose_experts_kernel(model, plan)
    for name, site in plan.attention.items():
        _tell_heads(model.get_submodule(name), site, site.of_rank(group.rank, group.size))
        _keep_own_heads(model.get_submodule(name), site, group)
    for name, style in plan.styles.items():
        module = model.get_submodule(name)
        _tell_features(module)
        forward = _forward_of(module, name, style, plan, group)
        if forward is not None:
            module.forward = forward


def _shrink_parameters(model: nn.Module, plan: TensorParallelPlan, rank: int) -> None:
    for parameter_plan in plan.parameters.values():
        if parameter_plan.slices is None:
            continue
        shape = parameter_plan.local_shape(rank)
        local = nn.Parameter(torch.empty(shape, dtype=parameter_plan.dtype, device="meta"), requires_grad=False)
        for name in (parameter_plan.name, *parameter_plan.aliases):  # one object under all names keeps it tied
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner).register_parameter(leaf, local)


def _choose_experts_kernel(model: PreTrainedModel, plan: TensorParallelPlan) -> None:
    """Leave torch's grouped matrix product where a rank's part of the experts has rows that it refuses."""
    for name in (name for name, style in plan.styles.items() if style in ("experts", "whole_experts")):
        rows = [parameter for parameter in model.get_submodule(name).parameters() if parameter.ndim > 2]
        if any(row.shape[-1] * row.itemsize % _GROUPED_ROW_BYTES for row in rows):
            model.set_experts_implementation("batched_mm")  # which can be traced
            return


def _tell_features(module: nn.Module) -> None:
    """Keep the feature counts that a linear tells of itself true."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape


def _tell_heads(module: nn.Module, site: AttentionSite, own: AttentionSite) -> None:
    """Replace the head counts and widths that an attention module keeps by a rank's `own`, also in its own copy of the
    config."""
    heads, kv_heads = own.num_heads, own.num_kv_heads
    widths = {site.num_heads * site.head_dim: heads * site.head_dim}
    for name in _QUERY_HEAD_COUNTS:
        if getattr(module, name, None) == site.num_heads:
            setattr(module, name, heads)
    for name in _KEY_VALUE_HEAD_COUNTS:
        if getattr(module, name, None) == site.num_kv_heads:
            setattr(module, name, kv_heads)
    for name in _QUERY_WIDTHS:
        if getattr(module, name, None) in widths:
            setattr(module, name, widths[getattr(module, name)])
    if hasattr(module, "num_key_value_groups"):
        setattr(module, "num_key_value_groups", heads // kv_heads)  # noqa: B010 (a plain number, not a submodule)
    config: Any = copy.copy(getattr(module, "config", None))
    if getattr(config, "num_attention_heads", None) == site.num_heads:
        config.num_attention_heads = heads
        if getattr(config, "num_key_value_heads", None) == site.num_kv_heads:
            config.num_key_value_heads = kv_heads
        module.config = config


class OwnHeads(nn.ModuleList):
    """A list of one module for each head, of which code sees this rank's heads; all keep their names.

    Those of the other ranks stay: they are as small as a head, and the plan's parameters are the same on every rank.
    """

    def __init__(self, whole: nn.ModuleList, own: range) -> None:
        super().__init__()
        self._modules = whole._modules
        self._own = own

    def __len__(self) -> int:
        return len(self._own)

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> nn.Module:  # type: ignore[override]  # one by one
        return self.get_submodule(str(self._own[index]))


def _keep_own_heads(module: nn.Module, site: AttentionSite, group: TensorParallelGroup) -> None:
    """Show lists of one module for each head this rank's heads alone."""
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.ModuleList) and len(child) in (site.num_heads, site.num_kv_heads):
            kept = site.heads_of if len(child) == site.num_heads else site.kv_heads_of
            module.set_submodule(name, OwnHeads(child, kept(group.rank, group.size)))


def _forward_of(
    module: nn.Module, name: str, style: str, plan: TensorParallelPlan, group: TensorParallelGroup
) -> Forward | None:
    """The forward of a module that must talk to the other ranks; None where its own will do."""
    whole = module.forward
    if style == "embedding":
        slices = plan.parameters[f"{name}.weight"].slices
        assert slices is not None
        return _vocabulary_parallel(module, whole, slices, group)
    if style == "rowwise":
        return _row_parallel(module, group)
    if style == "rowwise_split_input":
        slices = plan.parameters[f"{name}.weight"].slices
        assert slices is not None
        pieces = tuple(kept.pieces[0] for kept in slices)
        rows = _row_parallel(module, group)
        return lambda hidden: rows(group.own_part(hidden, pieces))
    if style == "colwise_gather_output":
        slices = plan.parameters[f"{name}.weight"].slices
        assert slices is not None
        sizes = tuple(kept.length for kept in slices)
        return lambda hidden: group.all_gather(whole(hidden), sizes)
    if style == "experts":
        return lambda *arguments, **options: group.all_reduce(whole(*arguments, **options))
    if style == "whole_experts":
        return _expert_parallel(module, name, whole, plan, group)
    return None


def _expert_parallel(
    module: nn.Module, name: str, whole: Forward, plan: TensorParallelPlan, group: TensorParallelGroup
) -> Forward:
    """Each rank computes the tokens that were routed to its own experts; what the others compute counts as zero.

    transformers' kernels know an index beyond the last expert as one that is elsewhere: tokens are sorted by expert,
    and the grouped product ends before those.
    """
    slices = next(kept for leaf, _ in module.named_parameters() if (kept := plan.parameters[f"{name}.{leaf}"].slices))
    starts, count = tuple(kept.pieces[0][0] for kept in slices), slices[group.rank].length
    module.num_experts, module._is_expert_parallel = count, True  # type: ignore[assignment]  # plain values

    def forward(hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        local = group.from_own_start(top_k_index, starts)
        is_elsewhere = (local < 0) | (local >= count)
        own = whole(hidden, local.masked_fill(is_elsewhere, count), top_k_weights.masked_fill(is_elsewhere, 0))
        return group.all_reduce(own)

    return forward


def _row_parallel(module: nn.Module, group: TensorParallelGroup) -> Forward:
    """Each rank multiplies its part of the input features; the bias is added once, to the sum."""

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
        total = group.all_reduce(F.linear(hidden, weight.t() if isinstance(module, Conv1D) else weight))
        return total if bias is None else total + bias

    return forward


def _vocabulary_parallel(
    module: nn.Module, whole: Forward, slices: tuple[Slice, ...], group: TensorParallelGroup
) -> Forward:
    """Each rank looks up the tokens of its part of the vocabulary; the others count as zero in the sum.

    The module's own forward does the look-up, so that an embedding that scales still scales.
    """
    starts, length = tuple(kept.pieces[0][0] for kept in slices), slices[group.rank].length
    if getattr(module, "padding_idx", None) is not None:
        module.padding_idx = None  # type: ignore[assignment]  # of training alone, and it may lie outside this part

    def forward(token_ids: torch.Tensor) -> torch.Tensor:
        local = group.from_own_start(token_ids, starts)
        own = local.clamp(0, length - 1)
        return group.all_reduce(whole(own).masked_fill((own != local).unsqueeze(-1), 0))

    return forward
