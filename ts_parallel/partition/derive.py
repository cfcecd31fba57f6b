"""A tensor-parallel plan for a family that ships none, read off the structure of its modules.

Inside an attention module the linear that takes in all heads closes it, the others open it. In any other module the
linears that widen the hidden size are paired with the one that comes back to it. What fits no pair stays whole on every
rank, which is always right.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ts_parallel.partition.attention_sites import AttentionSite

_OUTPUT_NAMES = {"o_proj", "out_proj", "c_proj", "dense", "wo", "o", "out"}


def derive_styles(model: PreTrainedModel, attention: Mapping[str, AttentionSite]) -> dict[str, str]:
    """Module name → `colwise` or `rowwise`."""
    hidden_size = model.config.get_text_config().hidden_size
    styles: dict[str, str] = {}
    for name, module in model.named_modules():
        linears = {f"{name}.{leaf}": child for leaf, child in module.named_children() if is_linear(child)}
        if name in attention:
            styles |= _attention_styles(linears, attention[name])
        elif name and not any(name.startswith(f"{owner}.") for owner in attention):
            styles |= _mlp_styles(linears, hidden_size)
    return styles


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


def _mlp_styles(linears: Mapping[str, nn.Module], hidden_size: int) -> dict[str, str]:
    shapes = {name: in_and_out_features(module) for name, module in linears.items()}
    if len(shapes) < 2 or any(hidden_size not in shape for shape in shapes.values()):
        return {}
    *opening, closing = shapes  # registered in the order in which they are applied
    inner, outer = shapes[closing]
    if outer != hidden_size or any(shapes[name] != (hidden_size, inner) for name in opening):
        return {}
    return dict.fromkeys(opening, "colwise") | {closing: "rowwise"}
