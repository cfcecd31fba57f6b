"""How models other than causal language models are called, task by task: auto class, inputs, the output that is wanted.

B items of a micro-batch, S tokens of the longest or samples of a sound, M masks of a text, C × Y × X an image,
Q objects.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCTC,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForObjectDetection,
    AutoModelForQuestionAnswering,
    AutoModelForSemanticSegmentation,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from ts_parallel.errors import ConfigError, PlanError
from ts_parallel.partition.graph.trace import InputSpec
from ts_parallel.partition.model.sentence_modules import SentenceModules, read_json, read_sentence_modules

Call = Callable[[PreTrainedModel, Mapping[str, torch.Tensor]], torch.Tensor]

CTC = "ctc_speech_recognition"
MOST_ITEMS = 2**16
POOLED, SEGMENTS, MASKED = "pooling_mask", "token_type_ids", "masked_places"
"""Inputs that some models have: which tokens are pooled, which of a pair of texts a token belongs to, and `[B, M]`
where in a text its masks stand."""
PIXELS, SOUND = "pixel_values", "input_values"
_TOKENS = InputSpec(("B", "S"), torch.int64)
_TEXT = {"input_ids": _TOKENS, "attention_mask": _TOKENS}
_MOST_PIXELS, _MOST_SAMPLES = 4096, 2**25
_LEAST_PIXELS = 33  # of a side whose length is free: of 32 the backbones make one place, which a trace takes for fixed


@dataclass(frozen=True)
class ModelCall:
    """One task of one model."""

    auto_class: Any
    inputs: Mapping[str, InputSpec]
    limits: Mapping[str, int]
    """The largest value of each letter of the inputs' sizes."""
    call: Call
    least: Mapping[str, int] = field(default_factory=dict)
    """The smallest one, where that is not 1."""


def call_of_task(task: str, folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> ModelCall:
    """How `task` runs the model of `config`.

    Raises:
        ConfigError: the task is unknown.
        PlanError: the model is of a kind that the task cannot run.
        CheckpointError: the folder of sentence-transformers has what cannot be served.
    """
    if task not in _CALLS:
        raise ConfigError(f"task {task!r} is none of {list(TASKS)}")
    return _CALLS[task](folder, config, dtype)


def longest_text(config: PretrainedConfig) -> int:
    """The most tokens that a text may have; families that count positions from behind the padding id have fewer."""
    positions = int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2**20)
    from_padding = config.model_type in {"roberta", "xlm-roberta", "camembert", "mpnet", "xlm-roberta-xl"}
    return positions - (config.pad_token_id or 0) - 1 if from_padding else positions


def shortest_sound(config: PretrainedConfig) -> int:
    """The fewest samples of which the convolutions of a model of sound make two frames."""
    samples = 2
    for kernel, stride in reversed(list(zip(config.conv_kernel, config.conv_stride, strict=True))):
        samples = (samples - 1) * stride + kernel
    return samples


def _embedding(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> ModelCall:
    modules = read_sentence_modules(folder)
    inputs = {**_TEXT, POOLED: _TOKENS} if modules.leaves_prompt_out else _TEXT
    return _of_texts(AutoModel, inputs, config, _sentence_vectors(modules))


def _text_classes(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> ModelCall:
    auto_class = AutoModelForSequenceClassification
    return _of_texts(auto_class, _of_pairs(auto_class, config), config, _logits)


def _token_classes(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> ModelCall:
    return _of_texts(AutoModelForTokenClassification, _TEXT, config, _logits)


def _answers(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> ModelCall:
    auto_class = AutoModelForQuestionAnswering
    return _of_texts(auto_class, _of_pairs(auto_class, config), config, _starts_and_ends)


def _masks(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> ModelCall:
    inputs = {**_TEXT, MASKED: InputSpec(("B", "M"), torch.int64)}
    made = _of_texts(AutoModelForMaskedLM, inputs, config, _logits_at_masks)
    return ModelCall(made.auto_class, inputs, {**made.limits, "M": made.limits["S"]}, made.call)


def _encoder(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> ModelCall:
    return _of_texts(AutoModel, _TEXT, config, _last_hidden_state)


def _of_texts(auto_class: Any, inputs: Mapping[str, InputSpec], config: PretrainedConfig, call: Call) -> ModelCall:
    return ModelCall(auto_class, inputs, {"B": MOST_ITEMS, "S": longest_text(config)}, call)


def _image_classes(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> ModelCall:
    inputs = _pixels(config, _image_size(config), dtype)
    return ModelCall(AutoModelForImageClassification, inputs, {"B": MOST_ITEMS}, _logits)


def _objects(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> ModelCall:
    return _of_processed_images(AutoModelForObjectDetection, folder, config, dtype, _objects_and_boxes)


def _areas(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> ModelCall:
    return _of_processed_images(AutoModelForSemanticSegmentation, folder, config, dtype, _logits)


def _of_processed_images(
    auto_class: Any, folder: Path, config: PretrainedConfig, dtype: torch.dtype, call: Call
) -> ModelCall:
    """Images are as large as the folder's processor makes them: all alike, or each as it needs."""
    size = _size_of_processor(folder)
    inputs = _pixels(config, size or ("Y", "X"), dtype)
    sides = {} if size else {"Y": _MOST_PIXELS, "X": _MOST_PIXELS}
    return ModelCall(auto_class, inputs, {"B": MOST_ITEMS, **sides}, call, dict.fromkeys(sides, _LEAST_PIXELS))


def _speech(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> ModelCall:
    if not hasattr(config, "conv_kernel") or not hasattr(config, "vocab_size"):
        raise PlanError(f"task {CTC!r} serves models that hear samples, as wav2vec2 does, not {config.model_type!r}")
    inputs = {SOUND: InputSpec(("B", "S"), dtype)}
    least = {"S": shortest_sound(config)}
    return ModelCall(AutoModelForCTC, inputs, {"B": MOST_ITEMS, "S": _MOST_SAMPLES}, _likeliest, least)


_CALLS: Mapping[str, Callable[[Path, PretrainedConfig, torch.dtype], ModelCall]] = {
    "text_embedding": _embedding,
    "text_classification": _text_classes,
    "token_classification": _token_classes,
    "question_answering": _answers,
    "fill_mask": _masks,
    "image_classification": _image_classes,
    "object_detection": _objects,
    "semantic_segmentation": _areas,
    CTC: _speech,
    "encoder": _encoder,
}
TASKS = tuple(_CALLS)


def _of_pairs(auto_class: Any, config: PretrainedConfig) -> Mapping[str, InputSpec]:
    """The inputs of a model of texts that may come in pairs, whose tokens it may tell apart."""
    own = auto_class._model_mapping.get(type(config), None)
    tells_apart = getattr(config, "type_vocab_size", 0) > 1 and own is not None
    if tells_apart and SEGMENTS in inspect.signature(own.forward).parameters:
        return {**_TEXT, SEGMENTS: _TOKENS}
    return _TEXT


def _pixels(config: PretrainedConfig, size: tuple[int | str, int | str], dtype: torch.dtype) -> dict[str, InputSpec]:
    return {PIXELS: InputSpec(("B", getattr(config, "num_channels", 3), *size), dtype)}


def _image_size(config: PretrainedConfig) -> tuple[int, int]:
    size = getattr(config, "image_size", 224)
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _size_of_processor(folder: Path) -> tuple[int, int] | None:
    """Height and width of every image that it makes; None where they depend on the image, or there is no processor."""
    alone, together = folder / "preprocessor_config.json", folder / "processor_config.json"
    settings = read_json(alone) if alone.is_file() else {}
    if not alone.is_file() and together.is_file():
        settings = read_json(together).get("image_processor")
    size = settings.get("size") if isinstance(settings, dict) and settings.get("do_resize", True) else None
    if isinstance(size, int):  # as older versions of transformers wrote a square
        return size, size
    if not isinstance(size, dict) or settings.get("pad_size"):
        return None
    height, width = size.get("height"), size.get("width")
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _logits(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    logits: torch.Tensor = model(**inputs).logits
    return logits


def _last_hidden_state(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    hidden: torch.Tensor = model(**inputs).last_hidden_state
    return hidden


def _starts_and_ends(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """`[B, S, 2]`: of each token how likely an answer begins with it, and ends."""
    output = model(**inputs)
    return torch.stack([output.start_logits, output.end_logits], dim=-1)


def _logits_at_masks(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """`[B, M, V]`."""
    logits = _logits(model, {name: tensor for name, tensor in inputs.items() if name != MASKED})
    places = inputs[MASKED].unsqueeze(-1).expand(-1, -1, logits.shape[-1])
    return logits.gather(1, places)


def _objects_and_boxes(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """`[B, Q, classes + 4]`."""
    output = model(**inputs)
    return torch.cat([output.logits, output.pred_boxes], dim=-1)


def _likeliest(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Of each frame of a sound the token, `[B, frames]`."""
    return _logits(model, inputs).argmax(dim=-1)


def _sentence_vectors(modules: SentenceModules) -> Call:
    """`[B, numbers]`: pooled as the folder of sentence-transformers says."""

    def call(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        model_inputs = {name: tensor for name, tensor in inputs.items() if name != POOLED}
        return modules.pool(_last_hidden_state(model, model_inputs), inputs.get(POOLED, inputs["attention_mask"]))

    return call
