"""Round trips with a stand-in for TorchServe: who is answered, with what, and that nobody pays for another's fault."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from http_client import events

from ts_parallel.engine import engine as engine_module
from ts_parallel.engine.block_manager import BlockManager
from ts_parallel.engine.engine import Engine, EngineThread
from ts_parallel.engine.request import Request
from ts_parallel.engine.scheduler import Scheduler
from ts_parallel.errors import NotFoundError, RequestError
from ts_parallel.serving.exchange import EVENTS, JSON, TEXT, RawRequest, Reply
from ts_parallel.serving.openai.answers import Answer, CompletionStream, TextStream, WholeText
from ts_parallel.serving.openai.choices import Choice, GenerationJob
from ts_parallel.serving.text.detokenizer import TextDecoder
from ts_parallel.serving.text.stop_strings import StopStrings
from ts_parallel.serving.torchserve.transports import continuous_batching
from ts_parallel.serving.torchserve.transports.continuous_batching import ContinuousBatchingDrain, raw_request
from ts_parallel.step_plan import StepPlan

NUM_BLOCKS = 64


@dataclass
class Context:
    """What a handler sees of TorchServe's context, and TorchServe's reading of it afterwards."""

    request_ids: dict[int, str]
    headers: dict[int, dict[str, Any]] = field(default_factory=dict)
    statuses: dict[int, tuple[int, str]] = field(default_factory=dict)
    content_types: dict[int, str] = field(default_factory=dict)
    stopping_criteria: dict[int, Callable[[str], bool | None]] | None = None

    def get_all_request_header(self, index: int) -> dict[str, Any]:
        return self.headers.get(index, {"Host": "localhost"})

    def set_response_status(self, code: int, phrase: str, index: int) -> None:
        self.statuses[index] = (code, phrase)

    def set_response_content_type(self, index: int, value: str) -> None:
        self.content_types[index] = value


@dataclass(frozen=True)
class Sent:
    """What one job was sent in one round trip. `ts_stream_next` as in the header; None where there is none."""

    body: str
    status: int
    phrase: str
    content_type: str
    ts_stream_next: bool | None


class GatedRunner:
    """Says the position of each token, once as many steps were let through; raises once it is told to."""

    num_stages = 1

    def __init__(self) -> None:
        self.steps = threading.Semaphore(0)
        self.in_flight: deque[StepPlan] = deque()
        self.fails = False

    def submit(self, plan: StepPlan) -> None:
        if plan.chunks:
            self.in_flight.append(plan)

    def collect(self) -> list[int]:
        self.steps.acquire()
        if self.fails:
            raise RuntimeError("out of luck")
        plan = self.in_flight.popleft()
        return [chunk.end for chunk in plan.chunks if chunk.is_sampled]


class Letters:
    """A tokenizer that writes token 1 as a, 2 as b, and nothing for a token above 26; it fails at one token."""

    bad_token = 0

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        assert self.bad_token not in token_ids
        return "".join(chr(96 + token_id) for token_id in token_ids if token_id <= 26)


class FrontEnd:
    """TorchServe's side: it names all open jobs in each round trip and forwards what comes back."""

    def __init__(self) -> None:
        self.runner = GatedRunner()
        self.blocks = BlockManager(NUM_BLOCKS, block_size=4)
        scheduler = Scheduler(self.blocks, max_num_seqs=8, max_num_batched_tokens=64)
        self.engine = EngineThread(Engine(self.runner, scheduler), on_failure=lambda: None)
        self.tokenizer = Letters()
        self.decoder = TextDecoder(self.tokenizer)
        self.num_opened = 0
        self.may_leave: set[str] = set()
        self.jobs: dict[str, Any] = {}
        self._drain = ContinuousBatchingDrain(self.engine, self._open_job)

    def _open_job(self, request_id: str, request: RawRequest) -> GenerationJob | Reply:
        """The body names the answer's shape and its number of tokens."""
        self.num_opened += 1
        if request.route == "nowhere":
            return Reply.refusal(NotFoundError("no such route"))
        if request.route == "health":
            return Reply.whole("fine")
        shape, max_tokens = request.body
        if shape == "bad":
            return Reply.refusal(RequestError("a bad body", "shape"))
        answer: Answer = TextStream() if shape == "text" else WholeText()
        if shape == "events":
            answer = CompletionStream(request_id, "m", include_usage=False, has_usage_in_each=False)
        own = Request(request_id, (0,), max_tokens)
        self.engine.submit(own)
        return GenerationJob(answer, [Choice(own, self.decoder, StopStrings(()))], 1, self.engine)

    def round_trip(self, **routes: str) -> dict[str, Sent]:
        """What each job that is not left out is sent. A job that has ended is named no more."""
        names = dict(enumerate(self.jobs))
        headers: dict[int, dict[str, Any]] = {
            i: {"url_path": routes[name]} for i, name in names.items() if name in routes
        }
        headers |= {i: {"data": {"content-type": ""}} for i, name in names.items() if name.startswith("grpc")}
        headers |= {i: {"X-Client-May-Leave": "true"} for i, name in names.items() if name in self.may_leave}
        context = Context(dict(names), headers)
        bodies = self._drain.round_trip([{"body": self.jobs[name]} for name in names.values()], context)
        assert len(bodies) == len(names)
        assert context.request_ids.items() <= names.items()
        assert context.stopping_criteria is not None
        told = (context.statuses, context.content_types, context.stopping_criteria)
        assert all(part.keys() == context.request_ids.keys() for part in told)
        assert not any(body for index, body in enumerate(bodies) if index not in context.request_ids)
        sent = {
            name: Sent(
                bodies[index],
                *context.statuses[index],
                context.content_types[index],
                None if (ends := context.stopping_criteria[index](bodies[index])) is None else not ends,
            )
            for index, name in context.request_ids.items()
        }
        for name, part in sent.items():
            if not part.ts_stream_next:
                del self.jobs[name]
        return sent

    def trips_until(self, *names: str) -> dict[str, Sent]:
        """Round trips until each of these jobs was sent something; what each job was sent last."""
        sent: dict[str, Sent] = {}
        deadline = time.monotonic() + 30
        while not sent.keys() >= set(names):
            assert time.monotonic() < deadline
            sent |= self.round_trip()
        return sent

    def read_to_the_end(self, name: str) -> list[Sent]:
        parts = [self.trips_until(name)[name]]
        while parts[-1].ts_stream_next:
            parts.append(self.trips_until(name)[name])
        return parts

    def let_through(self, num_steps: int) -> None:
        """A job that was registered after others may miss the first of these steps, which was planned without it."""
        self.runner.steps.release(num_steps)


@contextmanager
def started() -> Iterator[FrontEnd]:
    front_end = FrontEnd()
    front_end.engine.start()
    try:
        yield front_end
    finally:
        front_end.runner.fails = True  # ends the thread
        front_end.engine.submit(Request("end", (0,), 1))
        front_end.let_through(1)
        wait_until(lambda: not front_end.engine.is_alive)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def front_end() -> Iterator[FrontEnd]:
    with started() as front_end:
        yield front_end


def test_job_without_news_is_left_out_of_the_reply(front_end: FrontEnd) -> None:
    front_end.jobs["a"] = ("text", 5)
    assert front_end.round_trip() == {}
    assert front_end.round_trip() == {}
    assert front_end.num_opened == 1


def test_round_trip_after_an_end_waits_less_for_news(front_end: FrontEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    wait = front_end.engine.router.wait

    def noted(seconds: float) -> bool:
        waits.append(seconds)
        return wait(seconds)

    monkeypatch.setattr(front_end.engine.router, "wait", noted)
    front_end.jobs |= {"short": ("text", 1), "long": ("text", 9)}
    front_end.let_through(2)
    front_end.trips_until("short")
    assert len(set(waits)) == 1
    front_end.round_trip()
    front_end.round_trip()
    *_, before, soon, later = waits
    assert soon < before / 2 and later == before


def test_stream_is_sent_in_pieces_of_which_only_the_last_ends_it(front_end: FrontEnd) -> None:
    front_end.jobs["a"] = ("text", 2)
    front_end.let_through(1)
    assert front_end.trips_until("a") == {"a": Sent("a", 200, "OK", TEXT, True)}
    assert front_end.round_trip() == {}
    front_end.let_through(1)
    assert front_end.trips_until("a") == {"a": Sent("b", 200, "OK", TEXT, False)}


def test_whole_answer_comes_in_one_reply_that_is_no_stream(front_end: FrontEnd) -> None:
    front_end.jobs |= {"stream": ("text", 9), "whole": ("whole", 3)}
    for _ in range(2):
        front_end.let_through(1)
        assert front_end.trips_until("stream").keys() == {"stream"}
    front_end.let_through(7)
    sent = front_end.trips_until("whole")["whole"]
    assert (sent.status, sent.content_type, sent.ts_stream_next) == (200, JSON, None)
    assert json.loads(sent.body) == {
        "text": "abc",
        "finish_reason": "length",
        "usage": {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4},
    }


def test_stream_that_ends_with_its_first_piece_is_no_stream(front_end: FrontEnd) -> None:
    front_end.jobs["a"] = ("text", 1)
    front_end.let_through(1)
    assert front_end.trips_until("a") == {"a": Sent("a", 200, "OK", TEXT, None)}


def test_tokens_without_text_are_no_news_but_the_end_is(front_end: FrontEnd) -> None:
    front_end.jobs["a"] = ("text", 30)
    front_end.let_through(26)
    text = ""
    while len(text) < 26:
        text += front_end.trips_until("a")["a"].body
    assert text == "abcdefghijklmnopqrstuvwxyz"
    front_end.let_through(3)
    wait_until(lambda: front_end.engine.router.wait(0))
    assert front_end.round_trip() == {}
    front_end.let_through(1)
    assert front_end.trips_until("a") == {"a": Sent("", 200, "OK", TEXT, False)}


def test_jobs_that_run_together_each_get_their_own_pieces(front_end: FrontEnd) -> None:
    lengths = {"a": 3, "b": 7, "c": 12}
    front_end.jobs |= {name: ("text", length) for name, length in lengths.items()}
    front_end.let_through(30)
    texts = dict.fromkeys(lengths, "")
    deadline = time.monotonic() + 30
    while front_end.jobs:
        assert time.monotonic() < deadline
        for name, sent in front_end.round_trip().items():
            texts[name] += sent.body
    assert texts == {"a": "abc", "b": "abcdefg", "c": "abcdefghijkl"}


def test_job_that_comes_later_joins_those_that_run(front_end: FrontEnd) -> None:
    front_end.jobs["first"] = ("text", 5)
    front_end.let_through(1)
    front_end.trips_until("first")
    front_end.jobs["second"] = ("text", 2)
    front_end.round_trip()  # registers it; the engine waits at its gate with "first" alone
    front_end.let_through(4)
    assert "".join(part.body for part in front_end.read_to_the_end("second")) == "ab"
    assert front_end.num_opened == 2


def test_bad_body_gets_its_status_at_once_and_disturbs_nobody(front_end: FrontEnd) -> None:
    front_end.jobs["good"] = ("text", 2)
    front_end.let_through(1)
    front_end.trips_until("good")
    front_end.jobs["bad"] = ("bad", 0)
    sent = front_end.round_trip()
    assert sent.keys() == {"bad"}
    assert (sent["bad"].status, sent["bad"].phrase, sent["bad"].content_type) == (400, "Bad Request", JSON)
    assert sent["bad"].ts_stream_next is None
    assert json.loads(sent["bad"].body)["error"]["message"] == "a bad body"
    front_end.let_through(1)
    assert front_end.trips_until("good") == {"good": Sent("b", 200, "OK", TEXT, False)}


def test_route_is_read_from_the_jobs_own_headers(front_end: FrontEnd) -> None:
    front_end.jobs |= {"lost": ("text", 1), "ill": ("text", 1), "good": ("text", 1)}
    sent = front_end.round_trip(lost="nowhere", ill="/health/")
    assert sent.keys() == {"lost", "ill"}
    assert (sent["lost"].status, sent["lost"].phrase) == (404, "Not Found")
    assert sent["ill"] == Sent("fine", 200, "OK", JSON, None)


def test_job_that_came_by_grpc_is_answered_in_one_piece_that_says_so(front_end: FrontEnd) -> None:
    front_end.jobs |= {"stream": ("text", 9), "grpc": ("text", 3), "grpc_bad": ("bad", 0)}
    sent = front_end.round_trip()
    assert sent.keys() == {"grpc_bad"}
    assert (sent["grpc_bad"].status, sent["grpc_bad"].ts_stream_next) == (400, False)
    for _ in range(2):
        front_end.let_through(1)
        assert front_end.trips_until("stream").keys() == {"stream"}
    front_end.let_through(7)
    assert front_end.trips_until("grpc")["grpc"] == Sent("abc", 200, "OK", TEXT, False)


def test_whole_answer_whose_client_may_leave_begins_with_nothing(
    front_end: FrontEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TorchServe looks whether a client is still there only when it is sent something."""
    monkeypatch.setattr(continuous_batching, "_SECONDS_BETWEEN_BEATS", 0.05)
    front_end.may_leave |= {"whole", "stream"}
    front_end.jobs |= {"whole": ("whole", 2), "stream": ("text", 2), "other": ("whole", 2)}
    beat = Sent("", 200, "OK", JSON, True)
    assert front_end.trips_until("whole") == {"whole": beat}
    assert front_end.trips_until("whole") == {"whole": beat}
    front_end.let_through(6)
    sent: dict[str, Sent] = {}
    while front_end.jobs:
        sent |= front_end.trips_until(next(iter(front_end.jobs)))
    assert [json.loads(sent[name].body)["text"] for name in ("whole", "other")] == ["ab", "ab"]
    assert (sent["whole"].ts_stream_next, sent["other"].ts_stream_next) == (False, None)
    assert not front_end._drain._beats


def test_whole_answer_that_comes_soon_is_no_stream_though_its_client_may_leave(front_end: FrontEnd) -> None:
    front_end.may_leave.add("whole")
    front_end.jobs["whole"] = ("whole", 2)
    front_end.let_through(2)
    assert front_end.trips_until("whole")["whole"].ts_stream_next is None
    assert not front_end._drain._beats


def test_error_after_a_beginning_of_nothing_has_its_status_in_its_body(
    front_end: FrontEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuous_batching, "_SECONDS_BETWEEN_BEATS", 0.05)
    front_end.may_leave.add("whole")
    front_end.jobs["whole"] = ("whole", 20)
    front_end.trips_until("whole")
    front_end.runner.fails = True
    front_end.let_through(1)
    *_, last = front_end.read_to_the_end("whole")
    assert json.loads(last.body)["error"]["status"] == 500 and last.ts_stream_next is False


def test_client_that_left_is_aborted_and_the_others_go_on(front_end: FrontEnd) -> None:
    front_end.jobs |= {"stays": ("text", 3), "leaves": ("text", 90)}
    front_end.let_through(1)
    front_end.trips_until("stays")
    del front_end.jobs["leaves"]
    front_end.round_trip()
    with pytest.raises(KeyError):
        front_end.engine.router.take("leaves")
    front_end.let_through(3)  # "leaves" alone would need 89
    assert front_end.read_to_the_end("stays")[-1].ts_stream_next is False
    wait_until(lambda: front_end.blocks.num_free == NUM_BLOCKS)


def test_ended_job_that_is_named_once_more_is_left_out(front_end: FrontEnd) -> None:
    front_end.jobs["done"] = ("text", 1)
    front_end.let_through(1)
    front_end.trips_until("done")
    front_end.jobs["done"] = ("text", 1)
    assert front_end.round_trip() == {}
    assert front_end.num_opened == 1


def test_refused_job_that_is_named_once_more_is_left_out(front_end: FrontEnd) -> None:
    front_end.jobs["bad"] = ("bad", 0)
    assert front_end.round_trip().keys() == {"bad"}
    front_end.jobs |= {"bad": ("bad", 0), "other": ("text", 1)}
    assert front_end.round_trip() == {}
    assert front_end.num_opened == 2


def test_ended_job_frees_what_it_held(front_end: FrontEnd) -> None:
    front_end.jobs["a"] = ("text", 1)
    front_end.let_through(1)
    front_end.trips_until("a")
    with pytest.raises(KeyError):
        front_end.engine.router.take("a")
    assert front_end.blocks.num_free == NUM_BLOCKS


def fail(front_end: FrontEnd) -> None:
    front_end.runner.fails = True
    front_end.let_through(1)
    wait_until(lambda: not front_end.engine.is_alive)


def test_failure_before_the_first_piece_is_a_500(front_end: FrontEnd) -> None:
    front_end.jobs |= {"whole": ("whole", 9), "stream": ("events", 9)}
    front_end.round_trip()
    fail(front_end)
    sent = front_end.trips_until("whole", "stream")
    for name in ("whole", "stream"):
        assert (sent[name].status, sent[name].phrase) == (500, "Internal Server Error")
        assert (sent[name].content_type, sent[name].ts_stream_next) == (JSON, None)
        message = json.loads(sent[name].body)["error"]["message"]
        assert message == "the engine failed: RuntimeError: out of luck"


def test_failure_after_the_first_piece_ends_the_stream_with_an_error_of_its_kind(front_end: FrontEnd) -> None:
    front_end.jobs |= {"text": ("text", 9), "events": ("events", 9)}
    front_end.let_through(3)
    assert front_end.trips_until("text", "events")["events"].content_type == EVENTS
    fail(front_end)
    failed = front_end.trips_until("text", "events")
    assert {part.ts_stream_next for part in failed.values()} == {False}
    assert json.loads(failed["text"].body)["error"]["status"] == 500
    error, done = events(failed["events"].body)[-2:]
    assert error["error"]["status"] == 500 and done == "[DONE]"
    assert front_end.round_trip() == {}


def test_job_that_fails_in_our_own_hands_ends_alone(front_end: FrontEnd, caplog: pytest.LogCaptureFixture) -> None:
    front_end.jobs |= {"stream": ("events", 9), "whole": ("whole", 9), "short": ("text", 2)}
    front_end.tokenizer.bad_token = 4
    front_end.let_through(20)
    texts, statuses = dict.fromkeys(front_end.jobs, ""), {}
    deadline = time.monotonic() + 30
    while front_end.jobs:
        assert time.monotonic() < deadline
        for name, sent in front_end.round_trip().items():
            texts[name] += sent.body
            statuses.setdefault(name, sent.status)
    assert texts["short"] == "ab" and statuses["short"] == 200
    assert statuses["whole"] == json.loads(texts["whole"])["error"]["status"] == 500
    assert '"status": 500' in texts["stream"]
    assert "a request failed" in caplog.text
    wait_until(lambda: front_end.blocks.num_free == NUM_BLOCKS and not front_end.engine.num_open)


def test_job_that_was_forgotten_ends_with_an_error_when_it_is_asked_for(
    front_end: FrontEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    front_end.jobs["a"] = ("events", 90)
    front_end.let_through(1)
    front_end.trips_until("a")
    monkeypatch.setattr(engine_module, "SECONDS_TO_FORGET", -1.0)
    front_end.let_through(1)
    wait_until(lambda: not front_end.engine.router._emptied_at)
    (sent,) = front_end.round_trip().values()
    assert events(sent.body)[-2]["error"]["status"] == 504 and sent.ts_stream_next is False


def test_round_trip_that_fails_ends_the_worker_without_an_answer(
    front_end: FrontEnd, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Ended(BaseException):
        pass

    def end() -> None:
        raise Ended

    monkeypatch.setattr(continuous_batching, "exit_now", end)
    monkeypatch.setattr(front_end._drain._front_end, "exchange", lambda *_: pytest.fail("it was answered"))
    with pytest.raises(Ended):
        front_end._drain.handle([], Context({0: "a job whose data is missing"}, {}))
    assert "a round trip failed" in caplog.text


def test_raw_request_takes_body_or_data_and_headers_of_any_case() -> None:
    context = Context({0: "a"}, {0: {"URL_PATH": "/v1/completions/", "Content-Type": "application/json"}})
    assert raw_request({"body": {"x": 1}}, context, 0) == RawRequest("v1/completions", {"x": 1}, "application/json")
    assert raw_request({"data": b"x"}, context, 1) == RawRequest("", b"x", "")
    assert raw_request({}, context, 1) == RawRequest("", None, "")


def test_raw_request_takes_its_route_from_an_input_where_there_are_no_headers() -> None:
    context = Context({0: "a"}, {0: {"data": {"content-type": ""}, "url_path": {"content-type": ""}}})
    request = raw_request({"data": bytearray(b"{}"), "url_path": bytearray(b"/v1/models")}, context, 0)
    assert request == RawRequest("v1/models", bytearray(b"{}"), "")
