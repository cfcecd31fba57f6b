"""Embeddings: OpenAI's body and answer, and scores and ranks of texts by how near their vectors lie."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from ts_parallel.checkpoint.index import read_index
from ts_parallel.checkpoint.load import LoadItem, load_tensors
from ts_parallel.checkpoint.progress import Progress
from ts_parallel.errors import CheckpointError, RequestError
from ts_parallel.partition.model.sentence_modules import DENSE, LAYER_NORM, NORMALIZE, HeadModule, SentenceModules
from ts_parallel.serving.batch.jobs import Done, Inputs, Work, choice, count_field, known_fields, within_most
from ts_parallel.serving.batch.texts.reading import SETTINGS, Asked, TextReader
from ts_parallel.serving.batch.texts.scoring import PAIRS, Api, Pair, open_pairs, usage_of
from ts_parallel.serving.exchange import RawRequest, echo

Step: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

ROUTE = "v1/embeddings"
_FIELDS = ("input", "model", "dimensions", "encoding_format", "user", "prompt", "prompt_name", *SETTINGS)
ROUTES: Mapping[str, Sequence[str]] = {ROUTE: _FIELDS, **PAIRS}
_ACTIVATIONS: Mapping[str, type[nn.Module]] = {
    f"{kind.__module__}.{kind.__qualname__}": kind
    for kind in (nn.Tanh, nn.Identity, nn.ReLU, nn.GELU, nn.Sigmoid, nn.SiLU)
}
# By the folder's `similarity_fn_name`, as sentence-transformers' `similarity`.
_SIMILARITIES: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cosine": lambda one, two: F.normalize(one, dim=0) @ F.normalize(two, dim=0),
    "dot": torch.dot,
    "euclidean": lambda one, two: -(one - two).norm(),
    "manhattan": lambda one, two: -(one - two).abs().sum(),
}


class SentenceHead:
    """What a folder of sentence-transformers does with a vector once it is pooled: `[numbers]` → `[numbers]`."""

    def __init__(self, modules: SentenceModules) -> None:
        """
        Raises:
            CheckpointError: a module's files lack what it needs.
        """
        head = () if modules.is_normalised_alone else modules.head
        self._steps = [_READERS[module.kind](module) for module in head]

    @torch.inference_mode()
    def __call__(self, vector: torch.Tensor) -> torch.Tensor:
        vector = vector.float()
        for step in self._steps:
            vector = step(vector)
        return vector


class EmbeddingApi:
    """OpenAI's embeddings, and by the likeness of two vectors scores and ranks."""

    def __init__(self, reader: TextReader, head: SentenceHead, api: Api) -> None:
        self._reader = reader
        self._head = head
        self._api = api

    def open(self, item: RawRequest) -> Work | None:
        """None where the body is `{"text": …}` or raw text, for the model's own URL.

        Raises:
            RequestError: the body is none of those that are known, or too large.
        """
        pairs = open_pairs(item, self._api, self._reader, self)
        if pairs is not None:
            return pairs
        if item.route == ROUTE or (item.text() is None and "input" in item.fields()):
            return self._embed(item)
        return None

    def vector(self, output: torch.Tensor) -> torch.Tensor:
        """The whole answer for one text, without what a request says of it."""
        return self._head(output)[: self._reader.rules.dimensions]

    def as_list(self, output: torch.Tensor) -> list[float]:
        numbers: list[float] = self.vector(output).tolist()
        return numbers

    def _embed(self, item: RawRequest) -> Work:
        fields = known_fields(item, _FIELDS)
        texts = _inputs_of(fields)
        within_most(texts, "input", self._api.most_items)
        asked = self._asked(fields)
        dimensions = count_field(fields, "dimensions")
        encode = _base64 if choice(fields, "encoding_format", ("float", "base64")) == "base64" else torch.Tensor.tolist
        read = partial(self._read, asked=asked)
        return Work(
            [partial(read, text) for text in texts],
            lambda done: self._answer(done, lambda output: encode(self._shortened(output, dimensions))),
        )

    def _asked(self, fields: Mapping[str, Any]) -> Asked:
        asked, prompts = self._reader.asked(fields), self._reader.rules.prompts
        prompt, name = fields.get("prompt"), fields.get("prompt_name")
        if prompt is not None and not isinstance(prompt, str):
            raise RequestError(f"'prompt' must be a text, got {echo(prompt)}", "prompt")
        if prompt is None and name is not None:
            if not isinstance(name, str) or name not in prompts:
                raise RequestError(f"'prompt_name' must be one of {sorted(prompts)}, got {echo(name)}", "prompt_name")
            prompt = prompts[name]
        return Asked(asked.adds_special_tokens, asked.longest, prompt)

    def _read(self, text: str | Sequence[int], asked: Asked) -> Inputs:
        if isinstance(text, str):
            return self._reader.read(text, asked=asked)
        return self._reader.read_ids(text, asked)

    def _shortened(self, output: torch.Tensor, dimensions: int | None) -> torch.Tensor:
        """The first numbers of a vector, of length 1 again.

        Raises:
            RequestError: it has fewer.
        """
        vector = self.vector(output)
        if dimensions is None:
            return vector
        if dimensions > len(vector):
            raise RequestError(f"'dimensions' must be a number from 1 to {len(vector)}, got {dimensions}", "dimensions")
        return F.normalize(vector[:dimensions], dim=-1)

    def _answer(self, done: Sequence[Done], encode: Callable[[torch.Tensor], Any]) -> dict[str, Any]:
        data = [
            {"object": "embedding", "index": index, "embedding": encode(own.output)} for index, own in enumerate(done)
        ]
        return {"object": "list", "data": data, "model": self._api.model, "usage": usage_of(done)}

    def items(self, pairs: Sequence[Pair], asked: Asked) -> list[tuple[str, Callable[[], Inputs]]]:
        """Each text once, in however many pairs it is."""
        names: dict[str, str] = {}
        for pair in pairs:
            for text, name in zip(pair.texts, pair.names, strict=True):
                names.setdefault(text, name)
        return [(name, partial(self._reader.read, text, asked=asked)) for text, name in names.items()]

    def scores(self, pairs: Sequence[Pair], done: Sequence[Done]) -> list[float]:
        texts = dict.fromkeys(text for pair in pairs for text in pair.texts)
        vectors = dict(zip(texts, (self.vector(own.output) for own in done), strict=True))
        likeness = _SIMILARITIES[self._reader.rules.similarity]
        return [float(likeness(vectors[one], vectors[two])) for one, two in (pair.texts for pair in pairs)]


def _inputs_of(fields: Mapping[str, Any]) -> list[str | list[Any]]:
    """OpenAI's four kinds: a text, token ids, or a list of either."""
    given = fields.get("input")
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and given:
        if all(isinstance(own, str) for own in given) or all(isinstance(own, list) for own in given):
            return given
        if not any(isinstance(own, (str, list)) for own in given):
            return [given]  # whether these are token ids is seen where they are read
    if given == []:
        raise RequestError("'input' is empty", "input")
    raise RequestError(
        f"'input' must be a text, a list of texts, token ids or a list of lists of them, got {echo(given)}", "input"
    )


def _base64(vector: torch.Tensor) -> str:
    """Of float32, little-endian."""
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()


class _Dense(nn.Module):
    """A linear, its activation, and where a folder wants that, what went in beside what comes out."""

    def __init__(self, sizes: tuple[int, int], has_bias: bool, activation: nn.Module, adds_input: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(*sizes, bias=has_bias)
        self.residual = nn.Linear(*sizes, bias=False) if adds_input and sizes[0] != sizes[1] else None
        self._activation = activation
        self._adds_input = adds_input

    def forward(self, vector: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self._activation(self.linear(vector))
        if not self._adds_input:
            return made
        return made + (vector if self.residual is None else self.residual(vector))


class _LayerNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)

    def forward(self, vector: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.norm(vector)
        return normed


def _read_normalize(_: HeadModule) -> Step:
    return partial(F.normalize, dim=-1)


def _read_dense(module: HeadModule) -> Step:
    """Its activation is sentence-transformers' own where the folder names none."""
    settings = module.settings
    path = settings.get("activation_function", "torch.nn.modules.activation.Tanh")
    # torch.nn.Identity is the same under a shorter name.
    names = {f"torch.nn.{name.rpartition('.')[2]}": name for name in _ACTIVATIONS}
    activation = _ACTIVATIONS.get(names.get(path, path))
    if activation is None:
        raise CheckpointError(
            f"{module.folder}: activation_function {path!r} cannot be served; {sorted(_ACTIVATIONS)} can"
        )
    sizes = _size(module, "in_features"), _size(module, "out_features")
    has_bias, adds_input = settings.get("bias", True) is not False, bool(settings.get("use_residual"))
    return _filled(_Dense(sizes, has_bias, activation(), adds_input), module.folder)


def _read_layer_norm(module: HeadModule) -> Step:
    return _filled(_LayerNorm(_size(module, "dimension")), module.folder)


_READERS: Mapping[str, Callable[[HeadModule], Step]] = {
    NORMALIZE: _read_normalize,
    DENSE: _read_dense,
    LAYER_NORM: _read_layer_norm,
}


def _size(module: HeadModule, name: str) -> int:
    size = module.settings.get(name)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise CheckpointError(f"{module.folder / 'config.json'}: {name} must be a size, got {size!r}")
    return size


def _filled(made: nn.Module, folder: Path) -> Step:
    """Its parameters are read from the folder, under their names."""
    stored = read_index(folder)
    items = []
    for name, parameter in made.named_parameters():
        source = stored.get(name)
        if source is None or source.shape != tuple(parameter.shape):
            found = "no tensor" if source is None else f"shape {list(source.shape)}"
            raise CheckpointError(f"{folder}: {name} must have shape {list(parameter.shape)}, found {found}")
        items.append(LoadItem(parameter.data, source, None, name))
    load_tensors(items, Progress("head", is_shown=False))
    return made.eval()
