"""What a checkpoint's `config.json` says. Imports no more of transformers than that takes."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from ts_parallel.checkpoint.formats.placeholders import refuse_placeholder
from ts_parallel.checkpoint.settings import CONFIG_FILE, settings_folder
from ts_parallel.errors import CheckpointError, ConfigError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_model_config(folder: Path) -> PretrainedConfig:
    """The `config.json` of a checkpoint folder, or of the one above; never fetches, never runs code of the checkpoint.

    Raises:
        CheckpointError: there is none, or transformers does not know its model type or cannot use its values.
    """
    folder = settings_folder(folder)
    refuse_placeholder(folder / CONFIG_FILE)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(f"cannot read {folder / 'config.json'}: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """The first line of transformers' message, and the second where the first only announces it."""
    first, *rest = str(error).splitlines() or [type(error).__name__]
    return f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first


def choose_dtype(name: str, config: PretrainedConfig) -> torch.dtype:
    """The dtype that `name` says; `auto` is the checkpoint's own, float32 where it names none."""
    if name != "auto":
        return _DTYPES[name]
    own = getattr(config, "dtype", None) or torch.float32
    if own not in _DTYPES.values():
        raise ConfigError(f"the checkpoint's dtype {own} cannot be computed with: set dtype to one of {list(_DTYPES)}")
    return own


def max_positions_of(config: PretrainedConfig) -> int | None:
    """The longest sequence that the model was trained for; None where the config does not say."""
    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions
