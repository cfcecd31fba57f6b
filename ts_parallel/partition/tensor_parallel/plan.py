"""How each parameter of a model is laid over the ranks of a tensor-parallel group. A plan is data: nothing is touched.

Follows Megatron-LM (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053): the first linear of a pair keeps columns of
its output, the second keeps the matching rows of its input, one sum closes the pair. The embedding and the head keep
rows of the vocabulary.

Heads are cut between those that read the same key/value head, or between the query heads of one; a rank may have one
more of them than the next, and so of an MLP's features. What is cut by heads in one linear of an attention module is
so in all of them.

Styles of modules (transformers' names, plus `embedding` and `head`):
    colwise                 keeps a part of the output features
    colwise_gather_output   … and gathers the whole output
    rowwise                 keeps a part of the input features, sums the outputs
    rowwise_split_input     … and cuts its part out of a whole input
    experts                 its parameters are shards, sums the output
    whole_experts           keeps some of the experts whole, sums the output
    embedding, head         keep a part of the vocabulary
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from itertools import pairwise

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ts_parallel.checkpoint.stored import Slice
from ts_parallel.errors import PlanError
from ts_parallel.partition.program import AttentionSite, ParameterPlan, TensorParallelPlan, part_of
from ts_parallel.partition.tensor_parallel.derive import derive_styles, in_and_out_features, is_linear, layer_of

_REPLICATED_STYLES = {"replicate", "replicated_with_grad_allreduce", "mla_kv_a_proj", "local_params"}
_MODULE_STYLES = {"colwise", "colwise_gather_output", "rowwise", "rowwise_split_input"}
_OLD_NAMES = {"colwise_rep": "colwise_gather_output", "rowwise_rep": "rowwise_split_input", "moe_tp_experts": "experts"}

_KEY_VALUE_NAME = re.compile(r"(^|_)(k|v|kv|key|value)(_|$)")
# Fused query/key/value projections whose output is [all queries | all keys | all values]; in any other fused projection
# each head has its query, key and value side by side, and cutting between heads is all that is needed.
_CONCATENATED_QKV = {"c_attn", "qkv_proj", "Wqkv"}
# … except in these families where each query head has its own key/value head.
_SIDE_BY_SIDE_UNLESS_SHARED = {"gpt_bigcode"}
# Biases of places, which have a column for each head (Swin, BEiT).
_BIAS_TABLE = ".relative_position_bias_table"
_FUSED_GATE_UP = {"gate_up_proj"}
# So many features at a time go to a rank where they do not divide: a panel and a group of the kernels, or as many of a
# smaller unit as leave no rank with much more than the next.
_UNITS, _LEAST_UNITS = (64, 16, 2), 8
# Families whose own plan gathers what can stay split once the fused parts are cut one by one.
_BETTER_STYLES = {
    "phi3": {
        "layers.*.self_attn.qkv_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
}


def plan_tensor_parallel(
    model: PreTrainedModel,
    sites: Iterable[AttentionSite],
    size: int,
    expert_parallel: bool = False,
    whole: Collection[str] = (),
) -> TensorParallelPlan:
    """The plan for `size` ranks of a deferred, unsharded `model` whose attention calls are `sites`.

    Args:
        expert_parallel: whether each rank keeps some of a mixture's experts whole, instead of a part of each.
        whole: attention modules that every rank keeps whole, where the plan is derived.

    Raises:
        PlanError: a parameter cannot be cut into `size` parts; the message names it and the sizes that would work. Or
            there are no experts, or fewer than ranks, that could be kept whole.
    """
    sites = tuple(sites)
    attention = {site.module_name: site for site in sites}
    experts = _experts_of(model) if expert_parallel else []
    styles = {} if size == 1 else _styles(model, sites, whole)
    if size > 1 and experts:
        inside = tuple(f"{name}." for name in experts)
        styles = {name: style for name, style in styles.items() if not name.startswith(inside)}
        styles |= dict.fromkeys(experts, "whole_experts")
    cuts = _Cuts(size, attention, model.config.model_type)
    slices: dict[str, tuple[Slice, ...]] = {}
    modules = dict(model.named_modules())
    for name, style in styles.items():
        slices |= cuts.of_style(name, style, modules)
    for name, parameter in model.named_parameters():
        if name not in slices and not any(f"{name}.".startswith(f"{planned}.") for planned in styles):
            slices |= cuts.of_unplanned(name, parameter, modules)
    names = _names_of_parameters(model)
    parameters = {}
    for parameter, (name, *aliases) in names.items():
        cut = next((slices[alias] for alias in (name, *aliases) if alias in slices), None)
        parameters[name] = ParameterPlan(name, tuple(parameter.shape), parameter.dtype, tuple(aliases), cut)
    split = {name: site for name, site in attention.items() if cuts.is_split(name)}
    module_styles = {name: style for name, style in styles.items() if name in modules}
    return TensorParallelPlan(size, module_styles, parameters, split)


def _names_of_parameters(model: nn.Module) -> dict[torch.Tensor, list[str]]:
    """Parameters and persistent buffers → all their names, first the one the model registered first."""
    persistent = set(model.state_dict().keys())
    names: dict[torch.Tensor, list[str]] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        if name in persistent:
            names.setdefault(tensor, []).append(name)
    return names


def _styles(model: PreTrainedModel, sites: Iterable[AttentionSite], whole: Collection[str]) -> dict[str, str]:
    """Name of a module, or of a parameter that belongs to no linear → style, for every part of the model."""
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    shipped: dict[str, str] = dict(getattr(model, "tp_plan", None) or {})
    prefix = f"{model.base_model_prefix}."
    better = _BETTER_STYLES.get(model.config.model_type, {})
    better = {prefix + pattern: style for pattern, style in better.items()}
    _refuse_idle(better, names)  # our own entries; a shipped plan has some for parts that a model may lack
    shipped |= better
    inside = [pattern for pattern in shipped if not pattern.startswith("lm_head")]
    styles = _match(shipped, names) if inside else derive_styles(model, sites, whole)
    embedding, head = _embedding_of(model), model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is embedding and isinstance(module, nn.Embedding):
            styles[name] = "embedding"
        elif module is head:
            styles[name] = "head"
    return styles


def _experts_of(model: PreTrainedModel) -> list[str]:
    """The modules that stack experts and compute by transformers' interface for them, which knows absent ones.

    Raises:
        PlanError: there are none.
    """
    found = [name for name, module in model.named_modules() if hasattr(module, "_is_expert_parallel")]
    if not found:
        raise PlanError(
            f"enable_expert_parallel: model type {model.config.model_type!r} has no experts that transformers stacks; "
            "set it to false"
        )
    return found


def _embedding_of(model: PreTrainedModel) -> nn.Module | None:
    try:
        embedding: nn.Module | None = model.get_input_embeddings()
    except NotImplementedError:  # some models of images have none
        return None
    return embedding


def _match(patterns: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """transformers' plan (`layers.*.mlp.up_proj`) spelled out for each name that it matches."""
    compiled = [(_compile(pattern), style) for pattern, style in patterns.items()]
    styles = {}
    for name in names:
        for pattern, style in compiled:
            if pattern.match(name):
                styles[name] = _OLD_NAMES.get(style, style)
    return styles


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", r"[^.]+") + "$")


def _refuse_idle(patterns: Iterable[str], names: Iterable[str]) -> None:
    """
    Raises:
        PlanError: a pattern matches no name; the nearest is named.
    """
    for pattern in patterns:
        if not any(_compile(pattern).match(name) for name in names):
            near = difflib.get_close_matches(
                pattern, {re.sub(r"\.\d+\.", ".*.", name) for name in names}, n=1, cutoff=0
            )
            raise PlanError(f"the plan's {pattern!r} matches no module; the nearest is {near[0]!r}")


class _Cuts:
    """Turns styles into slices. Knows which heads belong to which projection."""

    def __init__(self, size: int, attention: Mapping[str, AttentionSite], model_type: str) -> None:
        self._size = size
        self._attention = attention
        self._model_type = model_type
        self._split: set[str] = set()

    def is_split(self, attention_module: str) -> bool:
        return attention_module in self._split

    def of_style(self, name: str, style: str, modules: Mapping[str, nn.Module]) -> dict[str, tuple[Slice, ...]]:
        """Parameter name → slices, for one module or parameter of `style`."""
        if style in _REPLICATED_STYLES or style == "experts":
            return {}
        if name not in modules:
            return self._of_bare_parameter(name, style, modules)
        module = modules[name]
        if style == "whole_experts":
            return self._of_whole_experts(name, module)
        if style in ("embedding", "head"):
            cut = self._vocabulary(f"{name}.weight", module.get_parameter("weight").shape[0])
            own = {f"{name}.weight": cut}
            return own | ({f"{name}.bias": cut} if getattr(module, "bias", None) is not None else {})
        if style not in _MODULE_STYLES or not isinstance(module, (nn.Linear, Conv1D)):
            raise PlanError(f"tensor-parallel style {style!r} of {name!r} ({type(module).__name__}) is not known")
        output_dim = 1 if isinstance(module, Conv1D) else 0
        if style.startswith("rowwise"):
            return {f"{name}.weight": self._rows(name, module, 1 - output_dim, splits_input=style != "rowwise")}
        pieces = self._columns(name, module.weight.shape[output_dim], gathers=style == "colwise_gather_output")
        cuts = {f"{name}.weight": tuple(Slice(output_dim, piece) for piece in pieces)}
        if module.bias is not None:
            cuts[f"{name}.bias"] = tuple(Slice(0, piece) for piece in pieces)
        return cuts

    def _of_bare_parameter(
        self, name: str, style: str, modules: Mapping[str, nn.Module]
    ) -> dict[str, tuple[Slice, ...]]:
        owner, _, leaf = name.rpartition(".")
        parameter = getattr(modules[owner], leaf)
        if style == "packed_colwise":  # [experts, 2 × features, hidden], or its bias [experts, 2 × features]
            dim = parameter.ndim - 2 if parameter.ndim > 2 else parameter.ndim - 1
            return {name: self._packed(name, parameter.shape[dim], 2, dim)}
        if style == "packed_rowwise":  # [experts, hidden, 2 × features]
            return {name: self._packed(name, parameter.shape[-1], 2, parameter.ndim - 1)}
        if style == "rowwise":
            return {name: self._cut(name, parameter.shape[-1], parameter.ndim - 1)}
        if style == "colwise":
            dim = max(0, parameter.ndim - 2)
            return {name: self._cut(name, parameter.shape[dim], dim)}
        raise PlanError(f"tensor-parallel style {style!r} of the parameter {name!r} is not known")

    def _of_whole_experts(self, name: str, module: nn.Module) -> dict[str, tuple[Slice, ...]]:
        """Of each stack of all experts, as many to each rank, the first ones one more where they do not divide."""
        count: int = module.num_experts  # type: ignore[assignment]  # a plain number
        if count < self._size:
            raise PlanError(
                f"enable_expert_parallel: {name!r} has num_experts {count}, of which tensor_parallel_size {self._size} "
                f"ranks cannot each keep one: set tensor_parallel_size to at most {count}, or enable_expert_parallel "
                "to false"
            )
        parts = [part_of(count, rank, self._size) for rank in range(self._size)]
        kept = tuple(Slice(0, ((own.start, len(own)),)) for own in parts)
        stacks = [leaf for leaf, parameter in module.named_parameters(recurse=False) if parameter.shape[0] == count]
        return {f"{name}.{leaf}": kept for leaf in stacks}

    def of_unplanned(
        self, name: str, parameter: torch.Tensor, modules: Mapping[str, nn.Module]
    ) -> dict[str, tuple[Slice, ...]]:
        """Slices of a parameter that no style speaks of: none, unless it has a row for each head of a split attention.

        Must be asked after all styles. A list of one module for each head is `apply_tensor_parallel`'s to cut.
        """
        site = self._site_of(name)
        if site is None or not self.is_split(site.module_name) or not parameter.ndim:
            return {}
        if name.endswith(_BIAS_TABLE) and parameter.shape[-1] == site.num_heads:
            return {name: tuple(Slice(1, (own,)) for own in self._heads(name, 0, site.num_heads, site.num_heads, site))}
        count, owner = parameter.shape[0], modules[name.rpartition(".")[0]]
        # One row as long as a head is the weight of a norm over a head, even where there are as many heads.
        if count not in (site.num_heads, site.num_kv_heads) or parameter.shape in ((site.head_dim,), (site.value_dim,)):
            return {}
        if is_linear(owner) and in_and_out_features(owner)[1] == count:
            raise PlanError(
                f"{name!r} of model type {self._model_type!r} has a row for each of {count} heads and no plan to "
                "split it: tensor_parallel_size must be 1"
            )
        return {name: tuple(Slice(0, (piece,)) for piece in self._heads(name, 0, count, count, site))}

    def _rows(self, name: str, module: nn.Linear | Conv1D, dim: int, splits_input: bool) -> tuple[Slice, ...]:
        features = module.weight.shape[dim]
        site = None if splits_input else self._site_of(name) or self._site_beside(name, features)
        if site is None or features % site.num_heads:
            return self._cut(f"{name}.weight", features, dim)
        pieces = self._heads(name, 0, features, site.num_heads, site)
        return tuple(Slice(dim, (piece,)) for piece in pieces)

    def _columns(self, name: str, features: int, gathers: bool) -> tuple[tuple[tuple[int, int], ...], ...]:
        """What each rank keeps of the output features of a linear, cut between heads inside an attention module."""
        leaf, site = name.rpartition(".")[2], self._site_of(name)
        if gathers or site is None:
            groups = 2 if leaf in _FUSED_GATE_UP and not gathers else 1
            return tuple(kept.pieces for kept in self._packed(f"{name}.weight", features, groups, 0))
        heads, kv_heads = site.num_heads, site.num_kv_heads
        self._split.add(site.module_name)
        if leaf in _CONCATENATED_QKV and not (self._model_type in _SIDE_BY_SIDE_UNLESS_SHARED and heads == kv_heads):
            widths = (heads * site.head_dim, kv_heads * site.head_dim, kv_heads * site.value_dim)
            if sum(widths) != features:
                raise PlanError(f"{name!r} has {features} output features, not {sum(widths)} as its heads would need")
            parts = [
                self._heads(name, start, width, count, site)
                for start, width, count in zip(
                    (0, widths[0], widths[0] + widths[1]), widths, (heads, kv_heads, kv_heads), strict=True
                )
            ]
            return tuple(tuple(part[rank] for part in parts) for rank in range(self._size))
        count = kv_heads if _KEY_VALUE_NAME.search(leaf) else heads
        return tuple((piece,) for piece in self._heads(name, 0, features, count, site))

    def _heads(self, name: str, start: int, width: int, count: int, site: AttentionSite) -> list[tuple[int, int]]:
        """`width` features from `start` that belong to `count` heads → `(start, length)` of each rank."""
        if not is_possible(site, self._size):
            works = [size for size in range(1, site.num_heads + 1) if is_possible(site, size)]
            raise PlanError(
                f"{name + '.weight'!r} has {site.num_heads} query heads and {site.num_kv_heads} key/value heads, which "
                f"{self._size} ranks cannot share: tensor_parallel_size must be one of {works}"
            )
        if width % count:
            raise PlanError(
                f"{name + '.weight'!r} has {width} features, which are no {count} heads: tensor_parallel_size must be 1"
            )
        one, kept = width // count, site.heads_of if count == site.num_heads else site.kv_heads_of
        every = [kept(rank, self._size) for rank in range(self._size)]
        return [(start + heads.start * one, len(heads) * one) for heads in every]

    def _cut(self, name: str, length: int, dim: int) -> tuple[Slice, ...]:
        return self._packed(name, length, 1, dim)

    def _packed(self, name: str, length: int, groups: int, dim: int) -> tuple[Slice, ...]:
        """Of each of `groups` equal parts of a dim as much to each rank; where it does not divide, in units that suit
        those who multiply by it."""
        part = length // groups
        self._require_one_each(name, part, dim)
        unit = 1
        if part % self._size:
            unit = next((unit for unit in _UNITS if part // unit >= _LEAST_UNITS * self._size), 1)
        parts = [part_of(part // unit, rank, self._size) for rank in range(self._size)]
        starts = [*(own.start * unit for own in parts), part]
        return tuple(
            Slice(dim, tuple((group * part + start, end - start) for group in range(groups)))
            for start, end in pairwise(starts)
        )

    def _vocabulary(self, name: str, length: int) -> tuple[Slice, ...]:
        """As `torch.chunk` cuts: the last rank's part may be shorter; but none has nothing."""
        self._require_one_each(name, length, 0)
        chunk = -(-length // self._size)
        if chunk * (self._size - 1) >= length:
            return self._cut(name, length, 0)
        starts = [*(rank * chunk for rank in range(self._size)), length]
        return tuple(Slice(0, ((start, end - start),)) for start, end in pairwise(starts))

    def _require_one_each(self, name: str, length: int, dim: int) -> None:
        if length < self._size:
            raise PlanError(
                f"dim {dim} of {name!r} has {length} rows, which {self._size} ranks cannot share: "
                f"tensor_parallel_size must be at most {length}"
            )

    def _site_of(self, name: str) -> AttentionSite | None:
        parts = name.split(".")
        return next(
            (
                self._attention[owner]
                for cut in range(len(parts), 0, -1)
                if (owner := ".".join(parts[:cut])) in self._attention
            ),
            None,
        )

    def _site_beside(self, name: str, features: int) -> AttentionSite | None:
        """The site that a linear closes which lies in a module beside it, as BERT and its kin have it."""
        for owner, site in self._attention.items():
            parent = owner.rpartition(".")[0]
            is_beside = name.startswith(f"{parent}.") and layer_of(parent) not in (None, parent)
            if is_beside and features == site.num_heads * site.value_dim:
                return site
        return None


def is_possible(site: AttentionSite, size: int) -> bool:
    """Whether `size` ranks can share the heads of one attention."""
    return size <= site.num_heads and (size == 1 or site.num_heads % site.num_kv_heads == 0)
