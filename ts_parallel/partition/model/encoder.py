"""How models other than causal language models are called, task by task: auto class, inputs, the output that is wanted.

B items of a micro-batch, S tokens of the longest, C × Y × X an image.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from ts_parallel.errors import CheckpointError, ConfigError
from ts_parallel.partition.graph.trace import InputSpec

Call = Callable[[PreTrainedModel, Mapping[str, torch.Tensor]], torch.Tensor]

TASKS = ("text_embedding", "text_classification", "image_classification", "encoder")
MOST_ITEMS = 2**16
_TEXT = {"input_ids": InputSpec(("B", "S"), torch.int64), "attention_mask": InputSpec(("B", "S"), torch.int64)}


@dataclass(frozen=True)
class ModelCall:
    """One task of one model."""

    auto_class: Any
    inputs: Mapping[str, InputSpec]
    limits: Mapping[str, int]
    """The largest value of each letter of the inputs' sizes."""
    call: Call


def call_of_task(task: str, folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> ModelCall:
    """How `task` runs the model of `config`.

    Raises:
        ConfigError: the task is unknown.
        CheckpointError: the folder's pooling is none that is known.
    """
    if task == "image_classification":
        shape = ("B", getattr(config, "num_channels", 3), *_image_size(config))
        inputs = {"pixel_values": InputSpec(shape, dtype)}
        return ModelCall(AutoModelForImageClassification, inputs, {"B": MOST_ITEMS}, _logits)
    limits = {"B": MOST_ITEMS, "S": longest_text(config)}
    if task == "text_classification":
        return ModelCall(AutoModelForSequenceClassification, _TEXT, limits, _logits)
    if task == "text_embedding":
        return ModelCall(AutoModel, _TEXT, limits, sentence_embedding(folder))
    if task == "encoder":
        return ModelCall(AutoModel, _TEXT, limits, _last_hidden_state)
    raise ConfigError(f"task {task!r} is none of {list(TASKS)}")


def longest_text(config: PretrainedConfig) -> int:
    """The most tokens that a text may have; families that count positions from behind the padding id have fewer."""
    positions = int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2**20)
    from_padding = config.model_type in {"roberta", "xlm-roberta", "camembert", "mpnet", "xlm-roberta-xl"}
    return positions - (config.pad_token_id or 0) - 1 if from_padding else positions


def _image_size(config: PretrainedConfig) -> tuple[int, int]:
    size = getattr(config, "image_size", 224)
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _logits(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    logits: torch.Tensor = model(**inputs).logits
    return logits


def _last_hidden_state(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    hidden: torch.Tensor = model(**inputs).last_hidden_state
    return hidden


def sentence_embedding(folder: Path) -> Call:
    """One vector `[B, hidden]` a text, pooled as the folder's own files say (the layout of sentence-transformers), by
    the mean over the tokens where there are none.

    Raises:
        CheckpointError: they name a pooling other than the mean, the first token or the largest value.
    """
    pooling, is_normalised = {"pooling_mode_mean_tokens"}, False
    modules = _read_json(folder / "modules.json") if (folder / "modules.json").is_file() else []
    for module in modules:
        kind = str(module["type"]).rpartition(".")[2]
        if kind == "Pooling":
            settings = _read_json(folder / module["path"] / "config.json")
            pooling = {name for name, value in settings.items() if name.startswith("pooling_mode") and value is True}
        elif kind == "Normalize":
            is_normalised = True
        elif kind != "Transformer":
            raise CheckpointError(f"{folder / 'modules.json'} has a module {kind!r}, which cannot be served")
    if len(pooling) != 1 or not pooling <= _POOLINGS.keys():
        raise CheckpointError(f"{folder} pools by {sorted(pooling)}; one of {sorted(_POOLINGS)} can be served")
    pool = _POOLINGS[pooling.pop()]

    def call(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        vectors = pool(_last_hidden_state(model, inputs), inputs["attention_mask"])
        return F.normalize(vectors, dim=-1) if is_normalised else vectors

    return call


def _mean_of_tokens(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)


def _first_token(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return hidden[:, 0]


def _largest(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return hidden.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).amax(dim=1)


_POOLINGS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "pooling_mode_mean_tokens": _mean_of_tokens,
    "pooling_mode_cls_token": _first_token,
    "pooling_mode_max_tokens": _largest,
}


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from None
