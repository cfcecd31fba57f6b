"""What goes in and comes out of models that are not causal language models, task by task."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, PretrainedConfig

from ts_parallel.checkpoint.settings import settings_folder
from ts_parallel.config import did_you_mean
from ts_parallel.errors import CheckpointError, RequestError
from ts_parallel.partition.model.encoder import ModelCall, call_of_task
from ts_parallel.partition.model.model_config import choose_dtype, read_model_config
from ts_parallel.serving.batch.micro_batching import Collator
from ts_parallel.serving.exchange import RawRequest
from ts_parallel.serving.text.model_files import read_tokenizer, vocabulary_of

_WHAT: Mapping[Any, str] = {str: "a text", list: "nested lists of numbers"}
_MOST_LABELS = 5  # as many as transformers' pipeline for images answers with

Preprocess = Callable[[RawRequest], dict[str, torch.Tensor]]
Postprocess = Callable[[torch.Tensor], Any]


@dataclass(frozen=True)
class Task:
    """One kind of request and answer. `postprocess` makes what `json.dumps` takes of an item's part of the output."""

    preprocess: Preprocess
    postprocess: Postprocess
    collator: Collator


def make_task(name: str, folder: Path, dtype: str) -> Task:
    """The task `name` for the model in `folder`, which computes in `dtype`.

    Raises:
        CheckpointError: the folder lacks what the task needs: a tokenizer, an image processor.
    """
    config = read_model_config(folder)
    call = call_of_task(name, folder, config, choose_dtype(dtype, config))
    if name == "image_classification":
        return Task(ImageInput(folder, call), Labels(config), Collator())
    text = TextInput(folder, call, config)
    if name == "text_classification":
        return Task(text, Labels(config), text.collator())
    if name == "text_embedding":
        return Task(text, as_lists, text.collator())
    return Task(text, as_lists, text.collator(trims_by="input_ids"))


class TextInput:
    """A text, raw or as `{"text": …}` → `input_ids` and its like, int64 `[S]` each."""

    def __init__(self, folder: Path, call: ModelCall, config: PretrainedConfig) -> None:
        self._tokenizer = read_tokenizer(folder)
        self._vocabulary = vocabulary_of(config, self._tokenizer)
        self._names = tuple(call.inputs)
        self._longest = min(self._tokenizer.model_max_length, call.limits["S"])

    def __call__(self, item: RawRequest) -> dict[str, torch.Tensor]:
        """
        Raises:
            RequestError: the body has no text, an empty one, one of more tokens than the model takes, or one with a
                token that the tokenizer knows and the model has not.
        """
        text = item.text()
        encoded = self._tokenizer(_field(item, "text", str) if text is None else text)
        num_tokens = len(encoded["input_ids"])
        if not num_tokens:
            raise RequestError("the text is empty", "text")
        if num_tokens > self._longest:
            raise RequestError(f"the text has {num_tokens} tokens, the model takes at most {self._longest}", "text")
        self._vocabulary.known(encoded["input_ids"], "text")
        return {name: torch.tensor(encoded[name]) for name in self._names}

    def collator(self, trims_by: str | None = None) -> Collator:
        """Fills shorter texts up on the right, with what the attention mask leaves out."""
        padding = dict.fromkeys(self._names, 0) | {"input_ids": self._tokenizer.pad_token_id or 0}
        return Collator(padding, trims_by)


class ImageInput:
    """An image file's bytes, or `{"pixel_values": [[[…]]]}` ready for the model → `pixel_values` `[C, Y, X]`."""

    def __init__(self, folder: Path, call: ModelCall) -> None:
        try:
            self._processor = AutoImageProcessor.from_pretrained(
                settings_folder(folder), backend="pil", local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"no usable image processor in {folder}: {str(error).splitlines()[0]}") from None
        spec = call.inputs["pixel_values"]
        self._shape, self._dtype = list(spec.sizes[1:]), spec.dtype

    def __call__(self, item: RawRequest) -> dict[str, torch.Tensor]:
        """
        Raises:
            RequestError: the body is no image that can be read, or pixels of another shape than the model's.
        """
        is_file = isinstance(item.body, (bytes, bytearray)) and "json" not in item.content_type
        pixels = self._read(bytes(item.body)) if is_file else _pixels(_field(item, "pixel_values", list))
        if list(pixels.shape) != self._shape:
            raise RequestError(
                f"pixel_values has shape {list(pixels.shape)}, the model takes {self._shape}", "pixel_values"
            )
        return {"pixel_values": pixels.to(self._dtype)}

    def _read(self, file: bytes) -> torch.Tensor:
        try:
            image = Image.open(io.BytesIO(file)).convert("RGB")
        # What Pillow raises for a file that is broken depends on its format.
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise RequestError(f"the body is no image that can be read: {error}") from None
        pixels: torch.Tensor = self._processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels


class Labels:
    """Logits `[num_labels]` → `[{"label", "score"}, …]`, the best first and at most five, scored as transformers'
    pipelines do: each label by itself where several can hold or there is but one, else against each other."""

    def __init__(self, config: PretrainedConfig) -> None:
        self._names: dict[int, str] = config.id2label
        kind = config.problem_type
        is_each_alone = kind == "multi_label_classification" or (kind is None and config.num_labels == 1)
        self._score: Callable[[torch.Tensor], torch.Tensor] = torch.sigmoid if is_each_alone else _softmax
        if kind == "regression":
            self._score = torch.Tensor.float

    def __call__(self, output: torch.Tensor) -> list[dict[str, Any]]:
        scores, order = self._score(output.float()).sort(descending=True)
        best = zip(order[:_MOST_LABELS].tolist(), scores[:_MOST_LABELS].tolist(), strict=True)
        return [{"label": self._names[index], "score": score} for index, score in best]


def as_lists(output: torch.Tensor) -> Any:
    """The numbers of a vector `[H]` as a list, of `[S, H]` as a list for each token."""
    return output.float().tolist()


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1)


def _field(item: RawRequest, name: str, kind: type) -> Any:
    """The one field that a JSON body has.

    Raises:
        RequestError: the body is no JSON object, or has other fields, or a value of another type.
    """
    fields = item.fields()
    for unknown in fields.keys() - {name}:
        raise RequestError(f"unknown field {unknown!r}{did_you_mean(unknown, {name: None})}", str(unknown))
    if not isinstance(fields.get(name), kind):
        raise RequestError(f"{name!r} must be {_WHAT[kind]}, got {type(fields.get(name)).__name__}", name)
    return fields[name]


def _pixels(value: list[Any]) -> torch.Tensor:
    try:
        return torch.tensor(value, dtype=torch.float32)
    except (ValueError, TypeError, RuntimeError) as error:
        raise RequestError(f"'pixel_values' must be nested lists of numbers: {error}", "pixel_values") from None
