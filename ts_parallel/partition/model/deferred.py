"""The unmodified model without its memory, and how the memory comes later."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ts_parallel.errors import PlanError
from ts_parallel.partition.model.attention_sites import IMPLEMENTATION
from ts_parallel.partition.model.model_config import first_line


def build_deferred(
    config: PretrainedConfig,
    dtype: torch.dtype,
    auto_class: Any = AutoModelForCausalLM,
    attention: str = IMPLEMENTATION,
) -> PreTrainedModel:
    """The model of `config` on the meta device: every module, shape and name, no memory.

    Args:
        auto_class: transformers' auto class of the kind of model that is wanted.
        attention: name of the registered attention function.

    Raises:
        PlanError: transformers has no such model for this config, or one with attention code of its own.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto_class.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
    except (ValueError, KeyError) as error:
        # A family that still has a class for each implementation looks ours up among them.
        is_legacy = isinstance(error, KeyError) and error.args == (attention,)
        reason = "its attention does not go through transformers' interface" if is_legacy else first_line(error)
        raise PlanError(f"model type {config.model_type!r} cannot be served: {reason}") from None
    return model.eval().requires_grad_(False)


@torch.no_grad()
def materialise(model: PreTrainedModel, device: torch.device, names: Collection[str] | None = None) -> None:
    """Give the parameters and buffers `names` (all, where None) of a deferred, sharded model their memory on `device`.

    Parameters and persistent buffers are left uninitialised for the checkpoint to fill. Non-persistent buffers (rotary
    frequencies, scales) are in no checkpoint: the model computes them again.
    """
    moved: dict[torch.Tensor, torch.nn.Parameter] = {}  # tied parameters are one tensor and stay one
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    wanted = {tensor for name, tensor in named if names is None or name in names}
    # The innermost model that a module is part of; it knows how to compute the module's buffers.
    owners = {
        module: part for part in model.modules() if isinstance(part, PreTrainedModel) for module in part.modules()
    }
    for module in model.modules():
        buffers = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer in wanted}
        for name, buffer in buffers.items():
            module._buffers[name] = torch.empty_like(buffer, device=device)
        if set(buffers) & module._non_persistent_buffers_set:
            owners[module]._init_weights(module)  # its parameters are still without memory: only the buffers are filled
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in wanted:
                continue
            if parameter not in moved:
                moved[parameter] = torch.nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
            module.register_parameter(name, moved[parameter])
