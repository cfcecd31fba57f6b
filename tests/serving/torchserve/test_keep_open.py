"""The request that each replica keeps open for itself: one a replica, never answered, in nobody's way."""

from __future__ import annotations

from typing import Any

import pytest

from ts_parallel.engine.router import TokenRouter
from ts_parallel.serving.exchange import RawRequest, Reply
from ts_parallel.serving.torchserve.keep_open import ROUTE, has_replicas
from ts_parallel.serving.torchserve.transports.continuous_batching import ContinuousBatchingDrain


class Engine:
    def __init__(self) -> None:
        self.router = TokenRouter()

    def abort(self, request_id: str) -> None:
        raise AssertionError("nothing was submitted")


class Context:
    """TorchServe's context of one round trip in which every request came by the same route."""

    def __init__(self, *request_ids: str, route: str = ROUTE) -> None:
        self.request_ids = dict(enumerate(request_ids))
        self.stopping_criteria: dict[int, Any] = {}
        self.statuses: dict[int, int] = {}
        self._route = route

    def get_all_request_header(self, index: int) -> dict[str, str]:
        return {"url_path": self._route}

    def set_response_status(self, code: int, phrase: str, index: int) -> None:
        self.statuses[index] = code

    def set_response_content_type(self, index: int, value: str) -> None: ...


def answer(request_id: str, request: RawRequest) -> Reply:
    return Reply.whole(f"answer to {request.route}")


def answered(drain: ContinuousBatchingDrain, context: Context) -> dict[str, str]:
    names = dict(context.request_ids)
    bodies = drain.round_trip([{"body": {}} for _ in names], context)
    return {names[index]: bodies[index] for index in context.request_ids}


def test_first_is_never_answered_and_the_next_ones_are_sent_back() -> None:
    drain = ContinuousBatchingDrain(Engine(), answer, has_replicas=True)
    assert answered(drain, Context("a")) == {}
    assert answered(drain, Context("a", "b")) == {"b": "{}"}
    assert answered(drain, Context("a")) == {}


def test_another_takes_its_place_once_it_is_gone() -> None:
    drain = ContinuousBatchingDrain(Engine(), answer, has_replicas=True)
    answered(drain, Context("a"))
    assert answered(drain, Context("b")) == {}
    assert answered(drain, Context("b", "c")) == {"c": "{}"}


def test_other_requests_are_answered_beside_it() -> None:
    drain = ContinuousBatchingDrain(Engine(), answer, has_replicas=True)
    answered(drain, Context("a"))
    assert answered(drain, Context("a", "b", route="health")) == {"b": "answer to health"}


def test_route_is_nothing_special_without_replicas() -> None:
    drain = ContinuousBatchingDrain(Engine(), answer)
    assert answered(drain, Context("a")) == {"a": f"answer to {ROUTE}"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"minWorkers": 2, "maxWorkers": 2, "continuousBatching": True}, True),
        ({"minWorkers": 1, "maxWorkers": 2, "continuousBatching": True}, True),
        ({"minWorkers": 1, "maxWorkers": 1, "continuousBatching": True}, False),
        ({"continuousBatching": True}, False),
        ({"minWorkers": 2, "maxWorkers": 2}, False),
    ],
)
def test_only_workers_that_share_a_queue_need_it(settings: dict[str, Any], expected: bool) -> None:
    assert has_replicas(settings) is expected
