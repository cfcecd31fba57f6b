"""A tensor-parallel plan for a family that ships none, read off the structure of its modules.

Inside an attention module the linear that takes in all heads closes it, the others open it. In any other module of a
decoder layer the linears that widen the hidden size are paired with the one that comes back to it. What fits no pair
stays whole on every rank, which is always right: so do a pair with a norm between its linears, and an attention module
that calls the attention more than once, for its heads may belong together.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ts_parallel.partition.program import AttentionSite

# `model.layers.3.mlp` → `model.layers.3`
_LAYER = re.compile(r".*?\.\d+(?=\.|$)")
_OUTPUT_NAMES = {"o_proj", "out_proj", "out_lin", "c_proj", "dense", "wo", "o", "out"}


def derive_styles(
    model: PreTrainedModel, sites: Iterable[AttentionSite], whole: Collection[str] = ()
) -> dict[str, str]:
    """Module name → `colwise` or `rowwise`, of a model whose attention calls are `sites`.

    Args:
        whole: the attention modules that are not to be split.
    """
    sites = tuple(sites)
    calls = Counter(site.module_name for site in sites)
    attention = {site.module_name: site for site in sites}
    hidden_size = getattr(model.config.get_text_config(), "hidden_size", None)
    layers = {layer for name in attention if (layer := layer_of(name)) is not None}
    linears: dict[str, dict[str, nn.Module]] = {name: {} for name, _ in model.named_modules()}
    for name, module in model.named_modules():
        if is_linear(module):
            linears[name.rpartition(".")[0]][name] = module
    styles: dict[str, str] = {}
    for name, site in attention.items():
        if name in whole or calls[name] > 1 or _has_norm_of(model.get_submodule(name), site.num_heads * site.value_dim):
            continue
        styles |= _attention_styles(linears[name], site) or _attention_styles(
            linears[name] | _beside(name, linears), site
        )
    for layer in layers:
        own = {
            name: found
            for name, found in linears.items()
            if layer_of(name) == layer and not _is_inside(name, attention)
        }
        # Where layers grow (Swin), the model's own size is that of the last of them.
        widths = (
            hidden_size,
            *sorted({site.num_heads * site.value_dim for site in sites if layer_of(site.module_name) == layer}),
        )
        mlps = {
            name: next(filter(None, (_mlp_styles(found, width) for width in widths)), {}) for name, found in own.items()
        }
        mlps = {name: found for name, found in mlps.items() if found}
        rest = {name: module for found in own.values() for name, module in found.items() if name not in styles}
        # BERT and its kin keep the two linears of an MLP in modules of their own.
        for name, found in (mlps or {layer: _mlp_styles(rest, hidden_size)}).items():
            closing = [model.get_submodule(linear) for linear, style in found.items() if style == "rowwise"]
            owner, inner = model.get_submodule(name), [in_and_out_features(one)[0] for one in closing]
            if not any(_has_norm_of(owner, width) or _has_convolution_of(owner, width) for width in inner):
                styles |= found
    return styles


def _has_norm_of(owner: nn.Module, width: int) -> bool:
    """Whether a module of `owner` that is no linear has weights for `width` features side by side."""
    children = (child for child in owner.children() if not is_linear(child))
    return any(weight.shape[-1:] == (width,) for child in children for weight in child.parameters(recurse=False))


def _has_convolution_of(owner: nn.Module, width: int) -> bool:
    """Whether features go through a convolution between linears, as SegFormer's do."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return any(isinstance(module, kinds) and width in module.weight.shape[:2] for module in owner.modules())


def _is_inside(name: str, attention: Mapping[str, AttentionSite]) -> bool:
    return any(f"{name}.".startswith(f"{owner}.") for owner in attention)


def _beside(attention: str, linears: Mapping[str, Mapping[str, nn.Module]]) -> dict[str, nn.Module]:
    """The linears in modules beside an attention module, where BERT and its kin keep the closing one."""
    parent = attention.rpartition(".")[0]
    if layer_of(parent) == parent:  # what lies beside it there is the layer's MLP
        return {}
    near = [found for owner, found in linears.items() if owner.rpartition(".")[0] == parent and owner != attention]
    return {name: module for found in near for name, module in found.items()}


def layer_of(name: str) -> str | None:
    found = _LAYER.match(name)
    return found[0] if found else None


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def in_and_out_features(module: nn.Module) -> tuple[int, int]:
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def _attention_styles(linears: Mapping[str, nn.Module], site: AttentionSite) -> dict[str, str]:
    closing = [
        name
        for name, module in linears.items()
        if name.rpartition(".")[2] in _OUTPUT_NAMES
        and in_and_out_features(module)[0] == site.num_heads * site.value_dim
    ]
    if len(closing) != 1 or len(linears) == 1:
        return {}
    return {name: "rowwise" if name in closing else "colwise" for name in linears}


def _mlp_styles(linears: Mapping[str, nn.Module], hidden_size: int | None) -> dict[str, str]:
    shapes = {name: in_and_out_features(module) for name, module in linears.items()}
    if len(shapes) < 2 or any(hidden_size not in shape for shape in shapes.values()):
        return {}
    *opening, closing = shapes  # registered in the order in which they are applied
    inner, outer = shapes[closing]
    if outer != hidden_size or any(shapes[name] != (hidden_size, inner) for name in opening):
        return {}
    return dict.fromkeys(opening, "colwise") | {closing: "rowwise"}
