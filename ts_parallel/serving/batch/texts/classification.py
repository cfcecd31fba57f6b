"""Classifiers of texts and of pairs of texts: labels as transformers' pipelines give them, vLLM's classes, and where
there is but one label, scores and ranks as sentence-transformers' CrossEncoder gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from ts_parallel.errors import CheckpointError, RequestError
from ts_parallel.partition.model.sentence_modules import TRANSFORMER, read_json, read_modules, sentence_folder
from ts_parallel.serving.batch.jobs import Done, Inputs, Work, known_fields, within_most
from ts_parallel.serving.batch.texts.reading import SETTINGS, Asked, TextReader
from ts_parallel.serving.batch.texts.scoring import PAIRS, Api, Pair, open_pairs, usage_of
from ts_parallel.serving.exchange import RawRequest, echo

ROUTE = "v1/classify"
_FIELDS = ("input", "model", "user", *SETTINGS)
ROUTES: Mapping[str, Sequence[str]] = {ROUTE: _FIELDS, **PAIRS}
_MOST_LABELS = 5  # as many as transformers' pipeline for images answers with
_ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    f"{kind.__module__}.{kind.__qualname__}": kind() for kind in (nn.Sigmoid, nn.Identity, nn.Tanh, nn.ReLU)
}


class Labels:
    """Logits `[num_labels]` → `[{"label", "score"}, …]`, the best first and at most five, scored as transformers'
    pipelines do: each label by itself where several can hold or there is but one, else against each other."""

    def __init__(self, config: PretrainedConfig) -> None:
        self._names: dict[int, str] = config.id2label or {}
        kind = config.problem_type
        is_each_alone = kind == "multi_label_classification" or (kind is None and config.num_labels == 1)
        self._score: Callable[[torch.Tensor], torch.Tensor] = torch.sigmoid if is_each_alone else _softmax
        if kind == "regression":
            self._score = torch.Tensor.float

    def __call__(self, output: torch.Tensor) -> list[dict[str, Any]]:
        scores, order = self.scores(output).sort(descending=True)
        best = zip(order[:_MOST_LABELS].tolist(), scores[:_MOST_LABELS].tolist(), strict=True)
        return [{"label": self.name(index), "score": score} for index, score in best]

    def scores(self, output: torch.Tensor) -> torch.Tensor:
        """Of each label, in their order."""
        return self._score(output.float())

    def name(self, index: int) -> str:
        return self._names.get(index, f"LABEL_{index}")


class ClassificationApi:
    """vLLM's classes; of a model with one label its scores, and Jina's ranks."""

    def __init__(
        self, reader: TextReader, labels: Labels, api: Api, activation: Callable[[torch.Tensor], torch.Tensor] | None
    ) -> None:
        """
        Args:
            activation: what makes a score of a model's one logit; None where it has several.
        """
        self._reader = reader
        self._labels = labels
        self._api = api
        self._activation = activation

    def open(self, item: RawRequest) -> Work | None:
        """None where the body is `{"text": …}` or raw text, for the model's own URL.

        Raises:
            RequestError: the body is none of those that are known, or too large, or asks for scores that the model has
                not.
        """
        pairs = open_pairs(item, self._api, self._reader, self)
        if pairs is not None:
            return pairs
        if item.route == ROUTE or (item.text() is None and "input" in item.fields()):
            return self._classify(item)
        return None

    def items(self, pairs: Sequence[Pair], asked: Asked) -> list[tuple[str, Callable[[], Inputs]]]:
        if self._activation is None:
            raise RequestError("the model has several labels, so no one score: send its texts to v1/classify")
        # As CrossEncoder does, a pair is cut to what the model takes, the longer text first.
        asked = Asked(asked.adds_special_tokens, asked.longest or self._reader.longest)
        return [(pair.names[1], partial(self._reader.read, *pair.texts, asked=asked)) for pair in pairs]

    def scores(self, pairs: Sequence[Pair], done: Sequence[Done]) -> list[float]:
        assert self._activation is not None
        return [float(self._activation(own.output.float())[0]) for own in done]

    def _classify(self, item: RawRequest) -> Work:
        fields = known_fields(item, _FIELDS)
        given = fields.get("input")
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise RequestError(f"'input' must be a text or a list of texts, got {echo(given)}", "input")
        within_most(texts, "input", self._api.most_items)
        asked = self._reader.asked(fields)
        return Work([partial(self._reader.read, text, asked=asked) for text in texts], self._classes)

    def _classes(self, done: Sequence[Done]) -> dict[str, Any]:
        data = []
        for index, own in enumerate(done):
            probabilities = self._labels.scores(own.output)
            label = self._labels.name(int(probabilities.argmax()))
            found = {"label": label, "probs": probabilities.tolist(), "num_classes": len(probabilities)}
            data.append({"index": index, **found})
        return {**self._api.named("classify"), "data": data, "usage": usage_of(done)}


def read_activation(folder: Path, config: PretrainedConfig) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What makes a score of the model's one logit, as CrossEncoder reads it; None where it has several labels.

    Raises:
        CheckpointError: the folder names one that is not known, or modules that would follow the model.
    """
    if config.num_labels != 1:
        return None
    if [kind for kind, _ in read_modules(folder)] not in ([], [TRANSFORMER]):
        raise CheckpointError(f"{folder / 'modules.json'}: a CrossEncoder is served whose one module is a Transformer")
    file = sentence_folder(folder) / "config_sentence_transformers.json"
    settings = read_json(file) if file.is_file() else {}
    of_config = getattr(config, "sentence_transformers", None) or {}
    path = (
        settings.get("activation_fn")
        or of_config.get("activation_fn")
        or getattr(config, "sbert_ce_default_activation_function", None)
        or "torch.nn.modules.activation.Sigmoid"
    )
    # torch.nn.Sigmoid is the same under a shorter name.
    names = {f"torch.nn.{name.rpartition('.')[2]}": name for name in _ACTIVATIONS}
    found = _ACTIVATIONS.get(names.get(path, path))
    if found is None:
        raise CheckpointError(f"{folder}: activation_fn {path!r} cannot be served; {sorted(_ACTIVATIONS)} can")
    return found


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1)
