"""The unmodified model without its memory, and how the memory comes later."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ts_parallel.errors import CheckpointError, ConfigError, PlanError
from ts_parallel.partition.attention_sites import IMPLEMENTATION

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_model_config(folder: Path) -> PretrainedConfig:
    """The `config.json` of a checkpoint folder; never fetches, never runs code of the checkpoint.

    Raises:
        CheckpointError: there is none, or transformers does not know its model type.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"no config.json in {folder}")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"cannot read {folder / 'config.json'}: {str(error).splitlines()[0]}") from None


def choose_dtype(name: str, config: PretrainedConfig) -> torch.dtype:
    """The dtype that `name` says; `auto` is the checkpoint's own, float32 where it names none."""
    if name != "auto":
        return _DTYPES[name]
    own = getattr(config, "dtype", None) or torch.float32
    if own not in _DTYPES.values():
        raise ConfigError(f"the checkpoint's dtype {own} cannot be computed with: set dtype to one of {list(_DTYPES)}")
    return own


def build_deferred(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of `config` on the meta device: every module, shape and name, no memory.

    Raises:
        PlanError: transformers has no causal language model for this config.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=IMPLEMENTATION)
    except ValueError as error:
        raise PlanError(f"model type {config.model_type!r} cannot be served: {str(error).splitlines()[0]}") from None
    return model.eval().requires_grad_(False)


@torch.no_grad()
def materialise(model: PreTrainedModel, device: torch.device) -> None:
    """Give every parameter and buffer of a deferred, sharded model its memory on `device`.

    Parameters and persistent buffers are left uninitialised for the checkpoint to fill. Non-persistent buffers (rotary
    frequencies, scales) are in no checkpoint: the model computes them again.
    """
    moved: dict[torch.Tensor, torch.nn.Parameter] = {}  # tied parameters are one tensor and stay one
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = torch.empty_like(buffer, device=device)
        if set(module._buffers) & module._non_persistent_buffers_set:
            model._init_weights(module)  # its parameters are still without memory: only the buffers are filled
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in moved:
                moved[parameter] = torch.nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
            module.register_parameter(name, moved[parameter])
