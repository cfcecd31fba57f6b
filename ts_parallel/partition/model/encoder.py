"""How models other than causal language models are called, task by task: auto class, inputs, the output that is wanted.

B items of a micro-batch, S tokens of the longest, C × Y × X an image.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from ts_parallel.errors import ConfigError
from ts_parallel.partition.graph.trace import InputSpec
from ts_parallel.partition.model.sentence_modules import SentenceModules, read_sentence_modules

Call = Callable[[PreTrainedModel, Mapping[str, torch.Tensor]], torch.Tensor]

TASKS = ("text_embedding", "text_classification", "token_classification", "image_classification", "encoder")
MOST_ITEMS = 2**16
POOLED, SEGMENTS = "pooling_mask", "token_type_ids"
"""Inputs that some models have: which tokens are pooled, and which of a pair of texts a token belongs to."""
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
        CheckpointError: the folder of sentence-transformers has what cannot be served.
    """
    if task == "image_classification":
        shape = ("B", getattr(config, "num_channels", 3), *_image_size(config))
        inputs = {"pixel_values": InputSpec(shape, dtype)}
        return ModelCall(AutoModelForImageClassification, inputs, {"B": MOST_ITEMS}, _logits)
    limits = {"B": MOST_ITEMS, "S": longest_text(config)}
    if task == "text_classification":
        auto_class = AutoModelForSequenceClassification
        return ModelCall(auto_class, _of_pairs(auto_class, config), limits, _logits)
    if task == "token_classification":
        return ModelCall(AutoModelForTokenClassification, _TEXT, limits, _logits)
    if task == "text_embedding":
        modules = read_sentence_modules(folder)
        inputs = {**_TEXT, POOLED: _TEXT["attention_mask"]} if modules.leaves_prompt_out else _TEXT
        return ModelCall(AutoModel, inputs, limits, _sentence_vectors(modules))
    if task == "encoder":
        return ModelCall(AutoModel, _TEXT, limits, _last_hidden_state)
    raise ConfigError(f"task {task!r} is none of {list(TASKS)}")


def longest_text(config: PretrainedConfig) -> int:
    """The most tokens that a text may have; families that count positions from behind the padding id have fewer."""
    positions = int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2**20)
    from_padding = config.model_type in {"roberta", "xlm-roberta", "camembert", "mpnet", "xlm-roberta-xl"}
    return positions - (config.pad_token_id or 0) - 1 if from_padding else positions


def _of_pairs(auto_class: Any, config: PretrainedConfig) -> Mapping[str, InputSpec]:
    """The inputs of a model of texts that may come in pairs, whose tokens it may tell apart."""
    own = auto_class._model_mapping.get(type(config), None)
    tells_apart = getattr(config, "type_vocab_size", 0) > 1 and own is not None
    if tells_apart and SEGMENTS in inspect.signature(own.forward).parameters:
        return {**_TEXT, SEGMENTS: _TEXT["input_ids"]}
    return _TEXT


def _image_size(config: PretrainedConfig) -> tuple[int, int]:
    size = getattr(config, "image_size", 224)
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _logits(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    logits: torch.Tensor = model(**inputs).logits
    return logits


def _last_hidden_state(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    hidden: torch.Tensor = model(**inputs).last_hidden_state
    return hidden


def _sentence_vectors(modules: SentenceModules) -> Call:
    """`[B, numbers]`: pooled as the folder of sentence-transformers says."""

    def call(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        model_inputs = {name: tensor for name, tensor in inputs.items() if name != POOLED}
        return modules.pool(_last_hidden_state(model, model_inputs), inputs.get(POOLED, inputs["attention_mask"]))

    return call
