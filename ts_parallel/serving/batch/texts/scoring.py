"""Scores of pairs of texts, and ranks of documents: vLLM's and Jina's bodies and answers, whatever computes them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ts_parallel.errors import RequestError
from ts_parallel.serving.batch.jobs import Done, Inputs, Work, count_field, known_fields, within_most
from ts_parallel.serving.batch.texts.reading import SETTINGS, Asked, TextReader
from ts_parallel.serving.exchange import RawRequest, echo

RERANK, SCORE = "v1/rerank", "v1/score"
_OF_RERANK = ("query", "documents", "top_n", "return_documents", "model", "user", *SETTINGS)
_OF_SCORE = ("text_1", "text_2", "model", "user", *SETTINGS)
PAIRS: Mapping[str, Sequence[str]] = {RERANK: _OF_RERANK, SCORE: _OF_SCORE}
"""The routes of pairs, each with the fields of its bodies."""


@dataclass(frozen=True)
class Pair:
    """Two texts, and what the request calls each of them."""

    texts: tuple[str, str]
    names: tuple[str, str]


class PairScorer(Protocol):
    """What computes scores."""

    def items(self, pairs: Sequence[Pair], asked: Asked) -> list[tuple[str, Callable[[], Inputs]]]:
        """Each item that is to go through the model, with its name."""
        ...

    def scores(self, pairs: Sequence[Pair], done: Sequence[Done]) -> list[float]:
        """Of what has become of these items, a number for each pair."""
        ...


@dataclass(frozen=True)
class Api:
    """What the answers of all APIs need."""

    model: str
    """Its served name."""
    most_items: int
    """Of one request."""

    def named(self, kind: str) -> dict[str, Any]:
        """The first fields of an answer."""
        return {"id": f"{kind}-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": self.model}


def usage_of(done: Sequence[Done]) -> dict[str, int]:
    num_tokens = sum(len(own.inputs["input_ids"]) for own in done)
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def open_pairs(item: RawRequest, api: Api, reader: TextReader, scorer: PairScorer) -> Work | None:
    """The work of a body for `v1/rerank` or `v1/score`, on its route or on the model's own URL; None of any other.

    Raises:
        RequestError: it is one, and something in it is wrong.
    """
    names: Collection[str] = () if item.text() is not None else item.fields().keys()
    if item.route == RERANK or (item.route == "" and "documents" in names):
        return _rerank(item, api, reader, scorer)
    if item.route == SCORE or (item.route == "" and "text_1" in names):
        return _score(item, api, reader, scorer)
    return None


def _rerank(item: RawRequest, api: Api, reader: TextReader, scorer: PairScorer) -> Work:
    fields = known_fields(item, _OF_RERANK)
    query = _text(fields.get("query"), "query")
    given = _list(fields.get("documents"), "documents")
    within_most(given, "documents", api.most_items)
    documents = [_document(own, f"documents[{index}]") for index, own in enumerate(given)]
    most = count_field(fields, "top_n")
    returns = fields.get("return_documents", True)
    if not isinstance(returns, bool):
        raise RequestError(f"'return_documents' must be true or false, got {echo(returns)}", "return_documents")
    pairs = [Pair((query, text), ("query", f"documents[{at}]")) for at, text in enumerate(documents)]

    def finish(done: Sequence[Done]) -> dict[str, Any]:
        scores = scorer.scores(pairs, done)
        order = sorted(range(len(scores)), key=lambda at: -scores[at])[:most]
        results = [
            {"index": at, "relevance_score": scores[at]} | ({"document": {"text": documents[at]}} if returns else {})
            for at in order
        ]
        named = api.named("rerank")
        return {"id": named["id"], "model": api.model, "usage": usage_of(done), "results": results}

    return _work(pairs, scorer, reader.asked(fields), finish)


def _score(item: RawRequest, api: Api, reader: TextReader, scorer: PairScorer) -> Work:
    fields = known_fields(item, _OF_SCORE)
    firsts, seconds = (_texts(fields.get(name), name) for name in ("text_1", "text_2"))
    within_most(firsts, "text_1", api.most_items)
    within_most(seconds, "text_2", api.most_items)
    if len(firsts) not in (1, len(seconds)):
        raise RequestError(
            f"'text_1' has {len(firsts)} texts, 'text_2' {len(seconds)}: 'text_1' must have one, or as many", "text_1"
        )
    if len(firsts) == 1:
        firsts = firsts * len(seconds)
    pairs = [
        Pair(pair, (f"text_1[{at}]", f"text_2[{at}]")) for at, pair in enumerate(zip(firsts, seconds, strict=True))
    ]

    def finish(done: Sequence[Done]) -> dict[str, Any]:
        scores = enumerate(scorer.scores(pairs, done))
        data = [{"index": index, "object": "score", "score": score} for index, score in scores]
        return {**api.named("score"), "data": data, "usage": usage_of(done)}

    return _work(pairs, scorer, reader.asked(fields), finish)


def _work(
    pairs: Sequence[Pair], scorer: PairScorer, asked: Asked, finish: Callable[[Sequence[Done]], Mapping[str, Any]]
) -> Work:
    names, items = zip(*scorer.items(pairs, asked), strict=True)
    return Work(items, finish, names.__getitem__)


def _texts(value: Any, name: str) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [_text(own, f"{name}[{index}]") for index, own in enumerate(_list(value, name))]


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise RequestError(f"{name!r} must be a list of texts, got {echo(value)}", name)
    return value


def _document(value: Any, name: str) -> str:
    return _text(value.get("text") if isinstance(value, dict) else value, name)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{name!r} must be a text, got {echo(value)}", name.partition("[")[0])
    return value
