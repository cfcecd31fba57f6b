"""`v1/embeddings`, `v1/classify`, `v1/score` and `v1/rerank` by models of batch inference."""

from __future__ import annotations

import base64
import math
import operator
import uuid
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ts_parallel.errors import RequestError
from ts_parallel.gateway.batch.items import ask_each, labels, numbers, texts
from ts_parallel.gateway.passing import headers_to_pass, read_fields
from ts_parallel.gateway.refusals import json_answer
from ts_parallel.gateway.upstream.models import Upstream, Upstreams

# What neither needs nor changes anything.
_NEUTRAL = frozenset({"model", "user"})


class Texts:
    """Routes that ask a model about texts. The models are lent.

    Its handler counts no tokens, so `usage` is null: no number is made up.
    """

    def __init__(self, upstreams: Upstreams) -> None:
        self._upstreams = upstreams

    async def embeddings(self, request: Request) -> Response:
        """`POST /v1/embeddings`: OpenAI's."""
        fields, upstream = await self._asked(request, {"input", "encoding_format", "dimensions"})
        how = fields.get("encoding_format") or "float"
        if how not in ("float", "base64"):
            raise RequestError(f"encoding_format must be float or base64, got {how!r}", "encoding_format")
        asked = texts(fields.get("input"), "input")
        answers = await ask_each(upstream, _items(asked), headers_to_pass(request))
        vectors = [numbers(own, upstream.name) for own in answers]
        size = fields.get("dimensions")
        if size is not None:
            vectors = [_shortened(own, size) for own in vectors]
        data = [
            {"object": "embedding", "index": index, "embedding": _base64(own) if how == "base64" else own}
            for index, own in enumerate(vectors)
        ]
        return json_answer({"object": "list", "data": data, "model": upstream.name, "usage": None})

    async def classify(self, request: Request) -> Response:
        """`POST /v1/classify`: each text's labels, the best first, as many as the model tells."""
        fields, upstream = await self._asked(request, {"input"})
        asked = texts(fields.get("input"), "input")
        answers = await ask_each(upstream, _items(asked), headers_to_pass(request))
        found = [labels(own, upstream.name) for own in answers]
        data = [
            {"index": index, "label": own[0]["label"], "score": own[0]["score"], "labels": own}
            for index, own in enumerate(found)
        ]
        return json_answer(_listed("classify", upstream, data))

    async def score(self, request: Request) -> Response:
        """`POST /v1/score`: how alike `text_1` and `text_2` are, one to each or one to all."""
        fields, upstream = await self._asked(request, {"text_1", "text_2"})
        left, right = texts(fields.get("text_1"), "text_1"), texts(fields.get("text_2"), "text_2")
        if len(left) not in (1, len(right)):
            raise RequestError(f"text_1 has {len(left)} texts: 1, or {len(right)} as text_2", "text_1")
        pairs = [(left[0 if len(left) == 1 else number], own) for number, own in enumerate(right)]
        scores = await _scores(upstream, pairs, headers_to_pass(request), "text_2")
        data = [{"index": index, "object": "score", "score": own} for index, own in enumerate(scores)]
        return json_answer(_listed("score", upstream, data))

    async def rerank(self, request: Request) -> Response:
        """`POST /v1/rerank`: Jina's and Cohere's, the best document first."""
        fields, upstream = await self._asked(request, {"query", "documents", "top_n", "return_documents"})
        documents = fields.get("documents")
        if isinstance(documents, list):
            documents = [own.get("text") if isinstance(own, dict) else own for own in documents]
        documents = texts(documents, "documents")
        (query,) = texts(fields.get("query") if isinstance(fields.get("query"), str) else None, "query")
        most = fields.get("top_n")
        if most is not None and (not isinstance(most, int) or most < 1):
            raise RequestError(f"top_n must be a number from 1, got {most!r}", "top_n")
        scores = await _scores(upstream, [(query, own) for own in documents], headers_to_pass(request), "documents")
        order = sorted(range(len(scores)), key=lambda number: -scores[number])
        results: list[dict[str, Any]] = [{"index": own, "relevance_score": scores[own]} for own in order]
        if fields.get("return_documents", True):
            results = [{**own, "document": {"text": documents[own["index"]]}} for own in results]
        made = {"id": f"rerank-{uuid.uuid4().hex}", "model": upstream.name, "results": results[:most], "usage": None}
        return json_answer(made)

    async def _asked(self, request: Request, known: set[str]) -> tuple[Mapping[str, Any], Upstream]:
        """
        Raises:
            RequestError: the body has a field that is not known, which might change the answer.
        """
        fields = read_fields(await request.body())
        for name, value in fields.items():
            if name not in known | _NEUTRAL and value is not None:
                raise RequestError(f"unknown field {name!r}: there are {', '.join(sorted(known))}", name)
        return fields, self._upstreams.named(fields.get("model"))


async def _scores(
    upstream: Upstream, pairs: Sequence[tuple[str, str]], headers: Mapping[str, str], field: str
) -> list[float]:
    """Of each pair, by what the model is: the cosine of two embeddings, or the first label's score of a model that
    reads both texts together."""
    unique = list(dict.fromkeys(text for pair in pairs for text in pair))
    (first,) = await ask_each(upstream, _items(unique[:1]), headers, field)
    if isinstance(first, list) and first and isinstance(first[0], dict):
        both = [{"text": left, "text_pair": right} for left, right in pairs]
        answers = await ask_each(upstream, both, headers, field)
        return [float(labels(own, upstream.name)[0]["score"]) for own in answers]
    rest = await ask_each(upstream, _items(unique[1:]), headers, field)
    vectors = dict(zip(unique, [numbers(own, upstream.name) for own in (first, *rest)], strict=True))
    return [_cosine(vectors[left], vectors[right]) for left, right in pairs]


def _items(asked: Sequence[str]) -> list[dict[str, str]]:
    return [{"text": text} for text in asked]


def _listed(kind: str, upstream: Upstream, data: list[dict[str, Any]]) -> dict[str, Any]:
    made = {"id": f"{kind}-{uuid.uuid4().hex}", "object": "list", "model": upstream.name, "data": data}
    return {**made, "usage": None}


def _shortened(vector: list[float], size: Any) -> list[float]:
    """Its first numbers, of length 1 again, as OpenAI's are: for models that were trained to bear it.

    Raises:
        RequestError: there are not so many.
    """
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= len(vector):
        raise RequestError(f"dimensions must be a number from 1 to {len(vector)}, got {size!r}", "dimensions")
    if size == len(vector):
        return vector
    length = math.hypot(*vector[:size])
    return [number / length for number in vector[:size]] if length else vector[:size]


def _cosine(left: Sequence[float], right: Sequence[float]) -> float:
    length = math.hypot(*left) * math.hypot(*right)
    return sum(map(operator.mul, left, right)) / length if length else 0.0


def _base64(vector: Sequence[float]) -> str:
    packed = array("f", vector)
    return base64.b64encode(packed.tobytes()).decode()
