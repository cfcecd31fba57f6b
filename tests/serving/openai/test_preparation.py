"""What takes long to prepare holds nobody up: its job is open at once, may be refused later, and may be left."""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from small_service import SmallService, checkpoint_with, small_service
from small_tokenizers import byte_level

from ts_parallel.serving.exchange import RawRequest, Reply
from ts_parallel.serving.openai.preparation import PreparedJob, takes_long

LONG_TEXT = "return a new list containing the answer; " * 25000  # 1 MB
SMALL = {"prompt": "the", "max_tokens": 3, "temperature": 0}
FORM: dict[str, Any] = {**SMALL, "max_tokens": 20, "guided_choice": [f"choice {number}" for number in range(600)]}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallService]:
    tokenizer = byte_level()
    folder = checkpoint_with(tmp_path_factory.mktemp("model") / "demo", tokenizer)
    gc.collect()
    gc.freeze()  # as a worker does that has loaded: what other tests have left here is not looked through
    with small_service(folder, tokenizer, max_num_waiting=2) as service:
        service.service._tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        yield service


class Holds:
    """For how long this thread kept all others waiting, in seconds of its own work: other programs do not count."""

    longest = 0.0

    def __enter__(self) -> Holds:
        clock = time.pthread_getcpuclockid(threading.get_ident())
        self._has_ended = threading.Event()

        def look() -> None:
            last = time.clock_gettime(clock)
            while not self._has_ended.is_set():
                time.sleep(0.0005)
                now = time.clock_gettime(clock)
                self.longest, last = max(self.longest, now - last), now

        self._thread = threading.Thread(target=look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._has_ended.set()
        self._thread.join()


@pytest.fixture(autouse=True)
def nothing_is_left(served: SmallService) -> Iterator[None]:
    yield
    router, deadline = served.service.engine.router, time.monotonic() + 10
    while time.monotonic() < deadline and (router.num_open or served.service.engine.figures().occupancy.num_running):
        time.sleep(0.01)
    assert not router.num_open and not router._reserved_at
    assert not served.service.engine.figures().occupancy.num_running


def large(body: object) -> bytes:
    return json.dumps(body).encode()


def test_only_what_takes_long_goes_into_threads() -> None:
    def long(body: object, content_type: str = "application/json") -> bool:
        return takes_long(RawRequest("v1/completions", body, content_type))

    assert not any(map(long, [SMALL, large(SMALL), "the", None, {"messages": [{"role": "user", "content": "x"}] * 9}]))
    assert all(map(long, [FORM, large({**SMALL, "response_format": None}), "the" * 9999, {"prompt": "the" * 9999}]))
    assert all(map(long, [{"prompt": [1] * 20000}, {"prompt": [[1] * 900] * 20}, large({"prompt": [1] * 20000})]))


def test_short_request_is_answered_while_a_long_text_is_tokenized(served: SmallService) -> None:
    name, long_one = served.open("tokenize", large({"prompt": LONG_TEXT}))
    assert isinstance(long_one, PreparedJob)
    assert served.send("v1/completions", **SMALL)[0] == 200
    assert long_one.advance(served.service.engine.router.take(name)) is None
    status, pieces = served.read(name, long_one)
    answer = json.loads("".join(pieces))
    ids = served.tokenizer(LONG_TEXT).input_ids
    assert status == 200 and answer == {"tokens": ids, "count": len(ids), "max_model_len": 512}


@pytest.mark.parametrize(
    ("route", "body", "parameter"),
    [
        ("", {"prompt": LONG_TEXT}, "prompt"),
        ("v1/completions", {"prompt": [LONG_TEXT, "the"]}, "prompt"),
        ("v1/chat/completions", {"messages": [{"role": "user", "content": LONG_TEXT}]}, "messages"),
    ],
)
def test_prompt_that_cannot_fit_is_refused_without_being_tokenized(
    served: SmallService, route: str, body: dict[str, Any], parameter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.service._encoder, "encode", lambda *_: pytest.fail("it is tokenized"))
    name, job = served.open(route, large(body))
    assert isinstance(job, PreparedJob)
    status, pieces = served.read(name, job)
    error = json.loads("".join(pieces))["error"]
    assert (status, error["param"]) == (400, parameter)
    assert "at least" in error["message"] and "512" in error["message"]


MANY = 1_200_000
MESSAGE = b'{"role": "user", "content": "x"}'
LONG_BODIES: dict[str, tuple[str, bytes, int]] = {
    "ids": ("v1/completions", large({"prompt": [100] * MANY}), 400),
    "ids of which one is none": ("v1/completions", large({"prompt": [*[100] * MANY, "x"]}), 400),
    "ids to echo": ("v1/completions", large({"prompt": [100] * MANY, "echo": True, "max_tokens": 0}), 400),
    "lists of ids": ("v1/completions", large({"prompt": [[100] * 4] * (MANY // 4)}), 400),
    "wrong stops": ("v1/completions", large({"prompt": "x", "stop": [1] * MANY}), 400),
    "wrong biases": ("v1/completions", large({"prompt": "x", "logit_bias": dict.fromkeys(range(MANY // 4), "x")}), 400),
    "messages": ("v1/chat/completions", b'{"messages": [' + b",".join([MESSAGE] * 180_000 + [b"{}"]) + b"]}", 400),
    "objects": ("v1/chat/completions", b'{"messages": [' + b",".join([b"{}"] * MANY) + b"]}", 400),
    "fields": ("v1/completions", large({f"name {at}": 1 for at in range(MANY // 4)}), 400),
    "ids to text": ("detokenize", large({"tokens": [100] * MANY}), 200),
    "no JSON": ("v1/completions", large({"prompt": [100] * MANY})[:-2], 400),
}


@pytest.mark.parametrize("name", LONG_BODIES)
def test_no_long_body_keeps_the_other_threads_waiting(served: SmallService, name: str) -> None:
    """6 MB, most of which took 0.2 to 60 s in one go."""
    route, body, status = LONG_BODIES[name]
    served.service.engine.reserve(name)
    with Holds() as holds:
        opened = served.service._open(name, RawRequest(route, body, "application/json"))
    served.service.engine.router.close(name)
    assert isinstance(opened, Reply) and opened.status == status, opened
    assert len(opened.body) < 1000 or status == 200
    assert holds.longest < 1  # 0.05 where nothing else runs: who looks has to get a core, too


def test_prompt_that_may_fit_is_counted(served: SmallService) -> None:
    text = "the list " * 400
    assert "at least, the" not in served.refuse(prompt=text)["message"]


def test_form_is_prepared_beside_the_streams_and_its_answer_is_whole(served: SmallService) -> None:
    name, job = served.open("v1/completions", FORM)
    assert isinstance(job, PreparedJob)
    status, pieces = served.read(name, job)
    assert status == 200 and json.loads("".join(pieces))["choices"][0]["text"] in FORM["guided_choice"]
    status, pieces = served.read(*served.open("v1/completions", large({**FORM, "guided_choice": None, "stream": True})))
    assert status == 200 and pieces[-1].endswith("[DONE]\n\n")
    assert served.refuse(prompt="the", guided_regex="(")["param"] == "guided_regex"


@pytest.mark.parametrize("seconds", [0, 0.05, 0.5])
def test_client_that_leaves_while_its_request_is_prepared_leaves_nothing(served: SmallService, seconds: float) -> None:
    engine = served.service.engine
    with served.service._admission:  # so that it is not with the engine yet
        name, job = served.open("v1/completions", FORM)
        assert engine.num_open == 1
        time.sleep(seconds)
        engine.abort(name)
        assert engine.num_open == 0
    after = [served.open("v1/completions", FORM) for _ in range(2)]
    assert [served.read(*own)[0] for own in after] == [200, 200]
    assert isinstance(job, PreparedJob) and (job._opened is None or isinstance(job._opened, Reply))


def test_client_that_leaves_before_its_turn_costs_nothing(
    served: SmallService, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served.service._admission:  # which holds both threads up
        first = [served.open("v1/completions", FORM) for _ in range(2)]
        name, job = served.open("v1/completions", FORM)
        served.service.engine.abort(name)
    assert [served.read(*own)[0] for own in first] == [200, 200]
    assert isinstance(job, PreparedJob) and not job._is_ready.is_set()


def test_time_counts_from_when_the_request_came(served: SmallService) -> None:
    with served.service._admission:
        name, job = served.open("v1/completions", {**FORM, "timeout": 0.2})
        time.sleep(0.3)
    status, pieces = served.read(name, job)
    assert status == 504 and "longer than its 0.2 s" in pieces[0]


def test_requests_that_are_prepared_count_as_open(served: SmallService) -> None:
    with served.service._admission:
        jobs = [served.open("v1/completions", FORM) for _ in range(10)]
        assert served.service.engine.num_open == 10
        status, answer = served.send("v1/completions", **SMALL)
        assert status == 429 and "10 of 10 requests" in answer["error"]["message"]
    assert [served.read(*own)[0] for own in jobs] == [200] * 10


def test_engine_that_fails_meanwhile_is_told_to_who_waits(served: SmallService) -> None:
    with served.service._admission:
        name, job = served.open("v1/completions", FORM)
        served.service.engine.router.fail_all("the engine failed")
        status, pieces = served.read(name, job)
    assert status == 500 and "the engine failed" in pieces[0]


def test_many_at_once_each_get_their_own(served: SmallService) -> None:
    found = dict[int, str]()

    def ask(number: int) -> None:
        fields = {"prompt": "the", "max_tokens": 20, "guided_choice": [f"answer {number}"] * 2}
        found[number] = served.send("v1/completions", **fields)[1]["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: f"answer {number}" for number in range(8)}
