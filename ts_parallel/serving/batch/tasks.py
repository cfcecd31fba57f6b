"""What goes in and comes out of models that are not causal language models, task by task."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor

from ts_parallel.checkpoint.settings import settings_folder
from ts_parallel.config import did_you_mean
from ts_parallel.errors import CheckpointError, RequestError
from ts_parallel.partition.model.encoder import ModelCall, call_of_task
from ts_parallel.partition.model.model_config import choose_dtype, read_model_config
from ts_parallel.partition.model.sentence_modules import read_sentence_modules
from ts_parallel.serving.batch.jobs import MOST_ITEMS, Work, known_fields
from ts_parallel.serving.batch.micro_batching import Collator
from ts_parallel.serving.batch.texts import classification, embedding
from ts_parallel.serving.batch.texts.classification import ClassificationApi, Labels, read_activation
from ts_parallel.serving.batch.texts.embedding import EmbeddingApi, SentenceHead
from ts_parallel.serving.batch.texts.entities import EntityApi
from ts_parallel.serving.batch.texts.reading import SETTINGS, TextReader, read_text_rules
from ts_parallel.serving.batch.texts.scoring import Api
from ts_parallel.serving.exchange import RawRequest

_WHAT: Mapping[Any, str] = {str: "a text", list: "nested lists of numbers"}

Preprocess = Callable[[RawRequest], dict[str, torch.Tensor]]
Postprocess = Callable[[torch.Tensor], Any]


@dataclass(frozen=True)
class Task:
    """One kind of request and answer. `postprocess` makes what `json.dumps` takes of an item's part of the output."""

    preprocess: Preprocess
    postprocess: Postprocess
    collator: Collator
    open: Callable[[RawRequest], Work | None] = lambda item: None
    """What a body asks for that is of several items, or of an API that others have; None: one item of the two above."""
    routes: tuple[str, ...] = ()
    """Below the model's own URL."""


def make_task(name: str, folder: Path, dtype: str, model: str = "", most_items: int = MOST_ITEMS) -> Task:
    """The task `name` for the model in `folder`, which computes in `dtype`.

    Args:
        model: its served name.
        most_items: of one request.

    Raises:
        CheckpointError: the folder lacks what the task needs: a tokenizer, an image processor.
    """
    config, folder = read_model_config(folder), settings_folder(folder)
    call = call_of_task(name, folder, config, choose_dtype(dtype, config))
    if name == "image_classification":
        return Task(ImageInput(folder, call), Labels(config), Collator())
    api = Api(model, most_items)
    reader = TextReader(folder, call, config, read_text_rules(folder, name == "text_embedding"))
    text, collator = TextInput(reader), reader.collator()
    if name == "text_classification":
        labels = Labels(config)
        classes = ClassificationApi(reader, labels, api, read_activation(folder, config))
        return Task(text, labels, collator, classes.open, classification.ROUTES)
    if name == "text_embedding":
        embeddings = EmbeddingApi(reader, SentenceHead(read_sentence_modules(folder)), api)
        return Task(text, embeddings.as_list, collator, embeddings.open, embedding.ROUTES)
    collator = reader.collator(trims_by="input_ids")
    if name == "token_classification":
        return Task(text, as_lists, collator, EntityApi(reader, config, most_items).open)
    return Task(text, as_lists, collator)


class TextInput:
    """A text, raw or as `{"text": …}`, which may have a `text_pair` → `input_ids` and its like, int64 `[S]` each."""

    def __init__(self, reader: TextReader) -> None:
        self._reader = reader

    def __call__(self, item: RawRequest) -> dict[str, torch.Tensor]:
        """
        Raises:
            RequestError: the body has no text, an empty one, one of more tokens than the model takes, or one with a
                token that the tokenizer knows and the model has not.
        """
        text = item.text()
        if text is not None:
            return self._reader.read(text)
        fields = known_fields(item, ("text", "text_pair", *SETTINGS))
        text, pair = fields.get("text"), fields.get("text_pair")
        for name, value in (("text", text), ("text_pair", pair)):
            if not isinstance(value, str) and (name == "text" or value is not None):
                raise RequestError(f"{name!r} must be a text, got {type(value).__name__}", name)
        assert isinstance(text, str)
        return self._reader.read(text, pair, self._reader.asked(fields))


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


def as_lists(output: torch.Tensor) -> Any:
    """The numbers of a vector `[H]` as a list, of `[S, H]` as a list for each token."""
    return output.float().tolist()


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
