"""Bodies that nobody means to send, to the routes of a model of batch inference: none fails, and none harms another."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from batch_worker import MINILM, Context, Worker, lone_rank
from fuzz_cases import anything, ids, objects, texts, written
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

_lists = st.lists(texts, max_size=3)
# What the fields may be that a description says nothing of but their names.
_KNOWN: Mapping[str, st.SearchStrategy[Any]] = {
    "input": texts | _lists | ids | st.lists(ids, max_size=3),
    "text": texts,
    "text_pair": texts,
    "query": texts,
    "documents": _lists | st.lists(st.fixed_dictionaries({"text": texts}), max_size=3),
    "text_1": texts | _lists,
    "text_2": texts | _lists,
    "dimensions": st.integers(-1, 400),
    "top_n": st.integers(-1, 5),
    "encoding_format": st.sampled_from(["float", "base64", "hex"]),
    "truncate_prompt_tokens": st.integers(-2, 600),
    "add_special_tokens": st.booleans(),
    "prompt_name": st.sampled_from(["query", "document", "none"]),
}
_REQUIRED = {"v1/embeddings": ("input",), "v1/rerank": ("query", "documents"), "v1/score": ("text_1", "text_2")}
_RIGHT = (b'{"input": ["a", "b"]}', "v1/embeddings")


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with lone_rank():
        yield Worker("text_embedding", MINILM)


def ask(worker: Worker, *sent: tuple[bytes, str]) -> list[tuple[int, str]]:
    """Status and body of each, all in one batch."""
    headers = {at: {"url_path": route, "Content-Type": "application/json"} for at, (_, route) in enumerate(sent)}
    context = Context(headers=headers, request_ids={at: str(at) for at in headers})
    answers = worker.handler.handle([{"body": _as_torchserve_has_it(body)} for body, _ in sent], context)
    return [(context.statuses[at][0], answer) for at, answer in enumerate(answers)]


def _as_torchserve_has_it(body: bytes) -> Any:
    """Parsed where it is JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return body


def test_every_body_is_answered_or_refused_and_its_neighbour_answered(worker: Worker) -> None:
    document = json.loads(ask(worker, (b"{}", "openapi.json"))[0][1])
    routes = {path[1:]: own["post"] for path, own in document["paths"].items() if "post" in own}
    (_, right), *_ = ask(worker, _RIGHT)
    vectors = [own["embedding"] for own in json.loads(right)["data"]]
    wrong: list[str] = []
    statuses: set[int] = set()

    @st.composite
    def requests(draw: st.DrawFn) -> tuple[bytes, str]:
        route = draw(st.sampled_from(sorted(routes)))
        schema = routes[route]["requestBody"]["content"]["application/json"]["schema"]
        schema = {**schema, "required": _REQUIRED.get(route, ())}
        body = draw(anything) if not draw(st.integers(0, 19)) else draw(objects(schema, {}, _KNOWN))
        return draw(written(body))[1], route

    @seed(7)
    @settings(
        max_examples=80, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=[*HealthCheck]
    )
    @given(requests())
    def check(request: tuple[bytes, str]) -> None:
        (status, answer), (neighbours, other) = ask(worker, request, _RIGHT)
        statuses.add(status)
        try:
            body = json.loads(answer, parse_constant=lambda name: wrong.append(f"{request}: {name}"))
            is_right = status == 200 or (400 <= status < 500 and isinstance(body["error"]["message"], str))
        except (ValueError, LookupError, TypeError):
            is_right = False
        if not is_right:
            wrong.append(f"{request}: {status} {answer[:300]}")
        if neighbours != 200 or not _is_near(json.loads(other), vectors):
            wrong.append(f"beside {request}: {neighbours} {other[:300]}")

    check()
    assert wrong == []
    assert {200, 400} <= statuses


def _is_near(answer: Any, vectors: list[list[float]]) -> bool:
    """A batch of another shape rounds elsewhere."""
    made = [own["embedding"] for own in answer["data"]]
    return all(abs(a - b) < 1e-4 for one, two in zip(made, vectors, strict=True) for a, b in zip(one, two, strict=True))
