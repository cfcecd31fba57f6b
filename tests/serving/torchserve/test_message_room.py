"""What one round trip carries of what is ready, with a stand-in for TorchServe and for the engine."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest

from ts_parallel.errors import RequestError
from ts_parallel.serving.exchange import EVENTS, JSON, RawRequest, Reply
from ts_parallel.serving.torchserve.transports.continuous_batching import ContinuousBatchingDrain
from ts_parallel.serving.torchserve.transports.message_room import BYTES_OF_A_MESSAGE, cut, num_bytes
from ts_parallel.serving.torchserve.transports.plain_batching import PlainBatches

LIMIT = 3 * BYTES_OF_A_MESSAGE


class Job:
    """Says the replies it was given, one each time it is asked."""

    is_whole = False

    def __init__(self, replies: Iterable[Reply]) -> None:
        self._replies = list(replies)

    def advance(self, news: None) -> Reply | None:
        return self._replies.pop(0) if self._replies else None

    def fail(self, error: RequestError) -> Reply:
        raise AssertionError(error)


class Door:
    """Always has news; `aborted` are those of which nobody wants any more."""

    def __init__(self) -> None:
        self.router = self
        self.aborted: list[str] = []

    def wait(self, seconds: float) -> bool:
        return True

    def take(self, request_id: str) -> None:
        return None

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)


class Context:
    def __init__(self, *request_ids: str) -> None:
        self.request_ids = dict(enumerate(request_ids))
        self.stopping_criteria: dict[int, Any] = {}
        self.statuses: dict[int, int] = {}

    def get_all_request_header(self, index: int) -> dict[str, Any]:
        return {"data": {"content-type": ""}} if "grpc" in self.request_ids[index] else {"Host": "localhost"}

    def set_response_status(self, code: int, phrase: str, index: int) -> None:
        self.statuses[index] = code

    def set_response_content_type(self, index: int, value: str) -> None: ...

    def set_response_header(self, index: int, name: str, value: str) -> None: ...


class FrontEnd:
    """Owns a drain and the jobs that are open in it."""

    def __init__(self, **jobs: list[Reply]) -> None:
        self.open = list(jobs)
        self.door, self.num_registered = Door(), 0
        self.texts = dict.fromkeys(jobs, "")
        self.statuses: dict[str, int] = {}
        self._replies = jobs
        self._drain = ContinuousBatchingDrain(self.door, self._open_job, most_bytes=LIMIT)

    def _open_job(self, request_id: str, request: RawRequest) -> Job:
        self.num_registered += 1
        return Job(self._replies[request_id])

    def round_trip(self) -> dict[str, int]:
        """How many bytes each job is sent."""
        context = Context(*self.open)
        names = dict(context.request_ids)
        bodies = self._drain.round_trip([{"body": {}} for _ in names], context)
        for index, name in context.request_ids.items():
            self.texts[name] += bodies[index]
            self.statuses[name] = context.statuses[index]
            if context.stopping_criteria[index](bodies[index]) is not False:  # it was the last, or no stream at all
                self.open.remove(name)
        return {name: num_bytes(bodies[index]) for index, name in context.request_ids.items()}

    def to_the_end(self) -> list[dict[str, int]]:
        trips = []
        while self.open and len(trips) < 50:
            trips.append(self.round_trip())
        return trips


def pieces(*bodies: str) -> list[Reply]:
    return [
        Reply(body, at == 0, at == len(bodies) - 1, content_type=EVENTS, is_stream=True)
        for at, body in enumerate(bodies)
    ]


@pytest.mark.parametrize(("text", "most", "head"), [("abcdef", 4, "abcd"), ("aéé", 4, "aé"), ("aé🙂", 5, "aé")])
def test_text_is_cut_between_two_letters(text: str, most: int, head: str) -> None:
    assert cut(text, most) == (head, text[len(head) :])


def test_stream_is_cut_into_messages_and_told_of_its_end_once() -> None:
    text = "aé🙂" * BYTES_OF_A_MESSAGE
    front_end = FrontEnd(a=pieces(text))
    trips = front_end.to_the_end()
    assert front_end.texts["a"] == text
    assert len(trips) == 8 and max(trip["a"] for trip in trips) <= BYTES_OF_A_MESSAGE
    assert (front_end.num_registered, front_end.door.aborted) == (1, ["a"])
    assert front_end.round_trip() == {}


def test_full_message_leaves_the_others_to_the_next_which_begins_with_them() -> None:
    large = "x" * BYTES_OF_A_MESSAGE
    front_end = FrontEnd(a=pieces(large, large, large), b=pieces("b", "b"), c=pieces(large, large), d=pieces("d", "d"))
    trips = front_end.to_the_end()
    assert [set(trip) for trip in trips[:4]] == [{"a"}, {"b", "c"}, {"d", "a"}, {"b", "c"}]
    assert front_end.texts == {"a": 3 * large, "b": "bb", "c": 2 * large, "d": "dd"}
    assert front_end.num_registered == 4


def test_whole_answer_of_the_limit_is_sent_and_a_larger_one_is_413() -> None:
    front_end = FrontEnd(a=[Reply.whole(LIMIT * "x")], b=[Reply.whole((LIMIT + 1) * "x", JSON)])
    front_end.to_the_end()
    assert front_end.statuses == {"a": 200, "b": 413}
    assert front_end.texts["a"] == LIMIT * "x"
    error = json.loads(front_end.texts["b"])["error"]
    assert error["status"] == 413 and str(LIMIT + 1) in error["message"] and str(LIMIT) in error["message"]
    assert front_end.door.aborted == ["a", "b"]


def test_large_whole_answer_leaves_in_parts_and_the_others_between_them() -> None:
    text = "aé🙂" * (BYTES_OF_A_MESSAGE // 4)
    front_end = FrontEnd(a=[Reply.whole(text)], b=pieces("b", "b", "b"))
    trips = front_end.to_the_end()
    assert front_end.texts == {"a": text, "b": "bbb"} and front_end.statuses["a"] == 200
    assert max(sum(trip.values()) for trip in trips) <= BYTES_OF_A_MESSAGE + 4
    assert [set(trip) for trip in trips[:3]] == [{"a", "b"}] * 2 + [{"b"}]


def test_rest_of_a_stream_is_dropped_with_its_client() -> None:
    front_end = FrontEnd(a=pieces(LIMIT * "x"), b=pieces("b", "b", "b", "b"))
    assert front_end.round_trip().keys() == {"a"}
    front_end.open.remove("a")
    assert [list(trip) for trip in front_end.to_the_end()] == 4 * [["b"]]
    assert not front_end._drain._ready


def test_grpc_answer_that_grows_too_large_ends_with_413_and_its_job_with_it() -> None:
    front_end = FrontEnd(grpc=pieces(*[BYTES_OF_A_MESSAGE * "x"] * 9))
    trips = front_end.to_the_end()
    assert json.loads(front_end.texts["grpc"])["error"]["status"] == front_end.statuses["grpc"] == 413
    assert trips[:3] == [{}, {}, {}] and len(trips) == 4
    assert (front_end.num_registered, front_end.door.aborted) == (1, ["grpc"])


def test_plain_batch_sends_ahead_what_its_last_message_has_no_room_for(
    sent_pieces: list[tuple[dict[int, str], dict[int, str]]],
) -> None:
    sizes = {"a": LIMIT, "b": LIMIT + 1, "c": LIMIT, "grpc": LIMIT, "e": 1}
    batches = PlainBatches(Door(), lambda name, _: Job([Reply.whole(sizes[name] * "x")]), most_bytes=LIMIT)
    context = Context(*sizes)
    ends = batches.handle([{"body": {}} for _ in sizes], context)
    messages = [{index: len(piece) for index, piece in message.items()} for message, _ in sent_pieces]
    assert [list(message) for message in messages] == [[1, 2], [4]] and messages[0][2] == LIMIT
    assert [len(end) for end in ends] == [LIMIT, 0, 0, LIMIT, 0]
    assert context.statuses == {0: 200, 1: 413, 2: 200, 3: 200, 4: 200}
