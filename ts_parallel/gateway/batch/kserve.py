"""KServe's open inference protocol, version 2: which models there are, whether they answer, and tensors in and out.

A model that generates text takes the texts of `text_input` and gives those of `text_output`; `parameters` are the
fields of a completion. Of all others each input is a field of an item's body, and its first dim counts the items.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ts_parallel.errors import RequestError
from ts_parallel.gateway.batch.items import ask_each, ask_one
from ts_parallel.gateway.described.fields import LIST, OBJECT, TEXT, body_of, check_types
from ts_parallel.gateway.passing import headers_to_pass, read_fields
from ts_parallel.gateway.refusals import SECONDS_TO_RETRY, UnknownModelError, json_answer
from ts_parallel.gateway.upstream.models import Upstream, Upstreams

_TEXT_IN, _TEXT_OUT = "text_input", "text_output"
_NUMBERS = ("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64")
_BYTES = "BYTES"
_MOST_DIMS = 16

_FIELDS = {"inputs": LIST, "outputs": LIST, "parameters": OBJECT, "id": TEXT}
INFERENCE = body_of(_FIELDS, "inputs")

Tensor = dict[str, Any]


class KServe:
    """The routes below `/v2`. The models are lent."""

    def __init__(self, upstreams: Upstreams) -> None:
        self._upstreams = upstreams

    async def server(self, request: Request) -> Response:
        """`GET /v2`."""
        try:
            own = version("ts-parallel")
        except PackageNotFoundError:
            own = "unknown"
        return json_answer({"name": "ts_parallel", "version": own, "extensions": []})

    async def live(self, request: Request) -> Response:
        """`GET /v2/health/live`: whether the gateway answers."""
        return json_answer({"live": True})

    async def ready(self, request: Request) -> Response:
        """`GET /v2/health/ready`: whether every model does."""
        return _ready(not any((await self._upstreams.look()).values()))

    async def model_ready(self, request: Request) -> Response:
        """`GET /v2/models/NAME/ready`."""
        upstream = self._named(request)
        return _ready((await self._upstreams.look())[upstream.name] is None, name=upstream.name)

    async def model(self, request: Request) -> Response:
        """`GET /v2/models/NAME`. Of a model that generates no text only its own handler knows the tensors."""
        upstream = self._named(request)
        await upstream.look()
        inputs, outputs = [], []
        if upstream.generates_text:
            inputs = [{"name": _TEXT_IN, "datatype": _BYTES, "shape": [-1]}]
            outputs = [{"name": name, "datatype": _BYTES, "shape": [-1]} for name in (_TEXT_OUT, "finish_reason")]
        made = {"name": upstream.name, "versions": [upstream.version], "platform": "torchserve"}
        return json_answer({**made, "inputs": inputs, "outputs": outputs})

    async def infer(self, request: Request) -> Response:
        """`POST /v2/models/NAME/infer`."""
        upstream = self._named(request)
        if "inference-header-content-length" in request.headers:
            raise RequestError("binary tensors are not supported: send them as JSON")
        body = await read_fields(await request.body())
        check_types(body, _FIELDS)
        inputs = body.get("inputs")
        if not isinstance(inputs, list) or not inputs or not all(isinstance(own, dict) for own in inputs):
            raise RequestError("'inputs' must be a list of at least one tensor", "inputs")
        tensors = {str(own.get("name")): _rows(own) for own in inputs}
        parameters = body.get("parameters") or {}
        if not upstream.is_ready:
            await upstream.look()
        headers = headers_to_pass(request)
        if upstream.generates_text:
            outputs = await _completed(upstream, tensors, parameters, headers)
        else:
            counts = {name: len(rows) for name, rows in tensors.items()}
            if len(set(counts.values())) != 1:
                raise RequestError(f"the inputs have different first dims: {counts}", "inputs")
            columns = list(zip(*tensors.values(), strict=True))
            bodies = [{**parameters, **dict(zip(tensors, column, strict=True))} for column in columns]
            outputs = _tensors(await ask_each(upstream, bodies, headers))
        made = {"model_name": upstream.name, "model_version": upstream.version, "outputs": _wanted(outputs, body)}
        return json_answer({**made, **({"id": body["id"]} if "id" in body else {})})

    def _named(self, request: Request) -> Upstream:
        """
        Raises:
            RequestError: there is no such model, or not in this version.
        """
        upstream = self._upstreams.named(request.path_params["name"])
        wanted = request.path_params.get("version", upstream.version)
        if wanted != upstream.version:
            raise UnknownModelError(f"the model {upstream.name!r} has version {upstream.version}, not {wanted}")
        return upstream


def _ready(is_ready: bool, **more: str) -> Response:
    headers = None if is_ready else {"Retry-After": str(SECONDS_TO_RETRY)}
    return json_answer({**more, "ready": is_ready}, 200 if is_ready else 503, headers)


async def _completed(
    upstream: Upstream, tensors: dict[str, list[Any]], parameters: dict[str, Any], headers: dict[str, str]
) -> list[Tensor]:
    if tensors.keys() != {_TEXT_IN}:
        raise RequestError(f"this model takes one input, {_TEXT_IN!r}, got {', '.join(tensors)}", "inputs")
    if parameters.get("stream"):
        raise RequestError("'stream' is not supported here: see /v1/completions", "parameters")
    prompts = tensors[_TEXT_IN]
    asked = {**parameters, "prompt": prompts[0] if len(prompts) == 1 else prompts, "model": upstream.served_name}
    answer = await ask_one(upstream, json.dumps(asked).encode(), headers, route="v1/completions")
    choices = sorted(answer["choices"], key=lambda own: own["index"])
    return [
        _tensor(_TEXT_OUT, _BYTES, [len(choices)], [own["text"] for own in choices]),
        _tensor("finish_reason", _BYTES, [len(choices)], [own["finish_reason"] for own in choices]),
    ]


def _rows(tensor: dict[str, Any]) -> list[Any]:
    """Its items, the parts along its first dim; of a text that is alone in its row, the text.

    Raises:
        RequestError: shape, datatype and data do not fit each other.
    """
    name, shape, kind = tensor.get("name"), tensor.get("shape"), tensor.get("datatype")
    place = f"inputs[{name}]"
    if not isinstance(name, str):
        raise RequestError("a tensor of 'inputs' has no name", "inputs")
    if not isinstance(shape, list) or not shape or not all(type(own) is int and own > 0 for own in shape):
        raise RequestError(f"{place}: shape must be a list of numbers from 1, got {shape!r}", "inputs")
    if kind != _BYTES and kind not in _NUMBERS:
        raise RequestError(
            f"{place}: datatype must be {_BYTES} or one of {', '.join(_NUMBERS)}, got {kind!r}", "inputs"
        )
    flat = list(_flat(tensor.get("data")))
    if len(flat) != math.prod(shape):
        raise RequestError(f"{place}: data has {len(flat)} values, shape {shape} has {math.prod(shape)}", "inputs")
    wanted: tuple[type, ...] = (str,) if kind == _BYTES else (int, float)
    for value in flat:
        if not isinstance(value, wanted):
            raise RequestError(f"{place}: {kind} has no {type(value).__name__}", "inputs")
    if kind == _BYTES and math.prod(shape[1:]) == 1:
        return flat
    nested: list[Any] = flat
    for size in reversed(shape[1:]):
        nested = [nested[at : at + size] for at in range(0, len(nested), size)]
    return nested


def _flat(data: Any, num_levels: int = _MOST_DIMS) -> Iterator[Any]:
    """All values of a list, or of lists in one another; what lies deeper than a tensor can is a value too."""
    if isinstance(data, list) and num_levels:
        for own in data:
            yield from _flat(own, num_levels - 1)
    else:
        yield data


def _tensors(answers: Sequence[Any]) -> list[Tensor]:
    """What a model of batch inference answers, item by item, as tensors.

    Raises:
        RequestError: the items' answers are of different shapes, which no tensor has.
    """
    first = answers[0]
    if isinstance(first, dict):
        return [_stacked(name, [own[name] for own in answers]) for name in first]
    if isinstance(first, list) and first and isinstance(first[0], dict):
        return [_stacked(name, [[each[name] for each in own] for own in answers]) for name in first[0]]
    return [_stacked("output", answers)]


def _stacked(name: str, rows: Sequence[Any]) -> Tensor:
    shapes = {tuple(_shape(row)) for row in rows}
    if len(shapes) != 1:
        raise RequestError(f"the answers' {name!r} have different shapes: ask for one item at a time", "inputs")
    flat = list(_flat(list(rows)))
    kind = _BYTES if isinstance(flat[0], str) else "INT64" if isinstance(flat[0], int) else "FP32"
    return _tensor(name, kind, [len(rows), *shapes.pop()], flat)


def _shape(value: Any) -> list[int]:
    return [len(value), *(_shape(value[0]) if value else [])] if isinstance(value, list) else []


def _tensor(name: str, kind: str, shape: list[int], data: list[Any]) -> Tensor:
    return {"name": name, "datatype": kind, "shape": shape, "data": data}


def _wanted(outputs: list[Tensor], body: dict[str, Any]) -> list[Tensor]:
    """Those that are asked for; all where none is.

    Raises:
        RequestError: there is none of such a name.
    """
    if not body.get("outputs"):
        return outputs
    known = {own["name"]: own for own in outputs}
    names = [own.get("name") if isinstance(own, dict) else own for own in body["outputs"]]
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise RequestError(f"there is no output {name!r}: there are {', '.join(known)}", "outputs")
    return [known[name] for name in names]
