"""What goes in and comes out of models that are not causal language models, task by task."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from ts_parallel.checkpoint.settings import settings_folder
from ts_parallel.errors import RequestError
from ts_parallel.partition.model.encoder import CTC, PIXELS, ModelCall, call_of_task
from ts_parallel.partition.model.model_config import choose_dtype, read_model_config
from ts_parallel.partition.model.sentence_modules import read_sentence_modules
from ts_parallel.serving.batch.images import detection
from ts_parallel.serving.batch.images.detection import ObjectApi
from ts_parallel.serving.batch.images.reading import SOURCES, ImageReader
from ts_parallel.serving.batch.images.segmentation import AreaApi
from ts_parallel.serving.batch.jobs import MOST_ITEMS, Work, known_fields
from ts_parallel.serving.batch.micro_batching import Collator
from ts_parallel.serving.batch.speech import ctc
from ts_parallel.serving.batch.speech.ctc import CtcApi
from ts_parallel.serving.batch.texts import classification, embedding, entities, masks, questions
from ts_parallel.serving.batch.texts.classification import ClassificationApi, Labels, read_activation
from ts_parallel.serving.batch.texts.embedding import EmbeddingApi, SentenceHead
from ts_parallel.serving.batch.texts.entities import EntityApi
from ts_parallel.serving.batch.texts.masks import MaskApi
from ts_parallel.serving.batch.texts.questions import QuestionApi
from ts_parallel.serving.batch.texts.reading import SETTINGS, TextReader, read_text_rules
from ts_parallel.serving.batch.texts.scoring import Api
from ts_parallel.serving.exchange import RawRequest

MOST_SECONDS = 120.0
"""Of a recording, where nothing else is said."""
_FIELDS = ("text", "text_pair", *SETTINGS)  # of one text

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
    routes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Below the model's own URL, each with the fields that its body may have."""
    fields: Sequence[str] = ()
    """Of a body on the model's own URL."""


def make_task(
    name: str,
    folder: Path,
    dtype: str,
    model: str = "",
    most_items: int = MOST_ITEMS,
    most_seconds: float = MOST_SECONDS,
) -> Task:
    """The task `name` for the model in `folder`, which computes in `dtype`.

    Args:
        model: its served name.
        most_items: of one request.
        most_seconds: of a recording.

    Raises:
        CheckpointError: the folder lacks what the task needs: a tokenizer, an image processor.
    """
    config, folder = read_model_config(folder), settings_folder(folder)
    call = call_of_task(name, folder, config, choose_dtype(dtype, config))
    if PIXELS in call.inputs:
        return _image_task(name, ImageReader(folder, call), config)
    if name == CTC:
        speech = CtcApi(folder, call, math.prod(config.conv_stride), most_seconds)
        return Task(speech.preprocess, speech.answer, Collator(), speech.open, ctc.ROUTES, ctc.FIELDS)
    return _text_task(name, folder, call, config, Api(model, most_items))


def _image_task(name: str, reader: ImageReader, config: PretrainedConfig) -> Task:
    if name == "image_classification":
        return Task(reader, Labels(config), Collator(), fields=SOURCES)
    if name == "object_detection":
        objects = ObjectApi(reader, config)
        return Task(reader, objects.as_named, Collator(), objects.open, fields=(*SOURCES, *detection.OTHERS))
    areas = AreaApi(reader, config)
    return Task(reader, areas.as_named, Collator(), areas.open, fields=SOURCES)


def _text_task(name: str, folder: Path, call: ModelCall, config: PretrainedConfig, api: Api) -> Task:
    reader = TextReader(folder, call, config, read_text_rules(folder, name == "text_embedding"))
    text, collator = TextInput(reader), reader.collator()
    if name == "text_classification":
        labels = Labels(config)
        classes = ClassificationApi(reader, labels, api, read_activation(folder, config))
        return Task(text, labels, collator, classes.open, classification.ROUTES, _FIELDS)
    if name == "text_embedding":
        embeddings = EmbeddingApi(reader, SentenceHead(read_sentence_modules(folder)), api)
        return Task(text, embeddings.as_list, collator, embeddings.open, embedding.ROUTES, _FIELDS)
    if name == "fill_mask":
        filled = MaskApi(reader, api.most_items)
        return Task(
            lambda item: filled.marked(text(item)), as_lists, filled.collator(), filled.open, fields=masks.FIELDS
        )
    collator = reader.collator(trims_by="input_ids")
    if name == "token_classification":
        return Task(text, as_lists, collator, EntityApi(reader, config, api.most_items).open, fields=entities.FIELDS)
    if name == "question_answering":
        return Task(text, as_lists, collator, QuestionApi(reader, api.most_items).open, fields=questions.FIELDS)
    return Task(text, as_lists, collator, fields=_FIELDS)


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
        fields = known_fields(item, _FIELDS)
        text, pair = fields.get("text"), fields.get("text_pair")
        for name, value in (("text", text), ("text_pair", pair)):
            if not isinstance(value, str) and (name == "text" or value is not None):
                raise RequestError(f"{name!r} must be a text, got {type(value).__name__}", name)
        assert isinstance(text, str)
        return self._reader.read(text, pair, self._reader.asked(fields))


def as_lists(output: torch.Tensor) -> Any:
    """The numbers of a vector `[H]` as a list, of `[S, H]` as a list for each token."""
    return output.float().tolist()
