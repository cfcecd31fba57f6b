"""Mailboxes hold what was delivered until it is taken, and tell who does not take."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from ts_parallel.engine import router as router_module
from ts_parallel.engine.router import Delivery, TokenRouter
from ts_parallel.engine.scheduler import TokenOutput
from ts_parallel.step_plan import TokenLogprobs


def opened(*request_ids: str) -> TokenRouter:
    router = TokenRouter()
    for request_id in request_ids:
        router.open(request_id)
    return router


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The router's own time: it stands still unless `now` is set."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(router_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_tokens_gather_until_they_are_taken() -> None:
    router = opened("a", "b")
    router.deliver([TokenOutput("a", 1, None), TokenOutput("b", 5, None)])
    router.deliver([TokenOutput("a", 2, None)])
    assert router.take("a") == Delivery([1, 2])
    assert router.take("a") == Delivery()
    assert router.take("b") == Delivery([5])


def test_what_was_taken_does_not_change_any_more() -> None:
    router = opened("a")
    router.deliver([TokenOutput("a", 1, None)])
    taken = router.take("a")
    router.deliver([TokenOutput("a", 2, "length")])
    assert taken == Delivery([1])


def test_last_delivery_comes_with_its_reason() -> None:
    router = opened("a")
    router.deliver([TokenOutput("a", 1, None)])
    assert not router.take("a").is_last
    router.deliver([TokenOutput("a", 2, "stop")])
    delivery = router.take("a")
    assert delivery == Delivery([2], "stop")
    assert delivery.is_last


def test_tokens_for_a_closed_mailbox_are_dropped() -> None:
    router = opened("a", "b")
    router.close("a")
    router.deliver([TokenOutput("a", 1, None), TokenOutput("b", 2, None)])
    assert router.take("b") == Delivery([2])
    with pytest.raises(KeyError):
        router.take("a")


def test_mailbox_may_be_closed_twice() -> None:
    router = opened("a")
    router.close("a")
    router.close("a")
    assert not router.wait(0)


def test_failure_ends_every_open_stream_and_no_finished_one() -> None:
    router = opened("open", "finished")
    router.deliver([TokenOutput("open", 1, None), TokenOutput("finished", 2, "length")])
    router.fail_all("broken")
    failed = router.take("open")
    assert failed == Delivery([1], error="broken")
    assert failed.is_last
    assert router.take("finished") == Delivery([2], "length")


def test_wait_says_whether_anybody_has_mail() -> None:
    router = opened("a", "b")
    assert not router.wait(0)
    router.deliver([TokenOutput("b", 1, None)])
    assert router.wait(0)
    router.take("b")
    assert not router.wait(0)


def test_wait_sees_a_failure_without_tokens() -> None:
    router = opened("a")
    router.fail_all("broken")
    assert router.wait(0)


@pytest.mark.parametrize("event", ["token", "failure"])
def test_one_who_waits_is_woken(event: str, monkeypatch: pytest.MonkeyPatch) -> None:
    router, looks, answers = opened("a"), threading.Event(), list[bool]()
    has_mail = router._has_mail

    def has_mail_seen() -> bool:
        looks.set()
        return has_mail()

    # The waiting thread looks under the lock, which it gives up only by waiting: what happens next finds it waiting.
    monkeypatch.setattr(router, "_has_mail", has_mail_seen)
    waiting = threading.Thread(target=lambda: answers.append(router.wait(600)), daemon=True)
    waiting.start()
    assert looks.wait(30)
    if event == "token":
        router.deliver([TokenOutput("a", 1, None)])
    else:
        router.fail_all("broken")
    waiting.join(30)
    assert answers == [True]


def test_tokens_that_continue_answers_gather_for_the_interval(clock: SimpleNamespace) -> None:
    router = TokenRouter(stream_interval=5)
    router.open("a")
    router.deliver([TokenOutput("a", 1, None)])
    assert router.wait(0)
    router.take("a")
    router.deliver([TokenOutput("a", 2, None)])
    clock.now += 4
    assert not router.wait(0)
    clock.now += 1
    router.deliver([TokenOutput("a", 3, None)])
    assert router.wait(0)
    assert router.take("a") == Delivery([2, 3])


@pytest.mark.parametrize("pressing", ["first", "last", "error", "time"])
def test_beginning_and_end_of_an_answer_wait_for_no_interval(pressing: str, clock: SimpleNamespace) -> None:
    router = TokenRouter(stream_interval=5)
    router.open("a")
    router.open("b", 1.0)
    router.deliver([TokenOutput("b", 1, None)])
    assert router.wait(0)
    router.take("b")
    assert not router.wait(0)
    if pressing == "first":
        router.deliver([TokenOutput("a", 1, None)])
    elif pressing == "last":
        router.deliver([TokenOutput("b", 1, "length")])
    elif pressing == "error":
        router.fail_all("broken")
    else:
        clock.now += 1
        router.expire()
    assert router.wait(0)
    router.take("a"), router.take("b")
    assert not router.wait(0)


def test_one_who_waits_out_the_interval_is_told_of_what_gathered() -> None:
    router = TokenRouter(stream_interval=0.2)
    router.open("a")
    router.deliver([TokenOutput("a", 1, None)])
    assert router.wait(0)
    began = time.monotonic()
    router.take("a")
    router.deliver([TokenOutput("a", 2, None)])
    assert router.wait(30)
    assert 0.1 < time.monotonic() - began < 20


def test_mailbox_is_full_from_its_limit_on() -> None:
    router = opened("a", "b", "c")
    router.deliver([TokenOutput("a", 1, None)])
    for count in range(3):
        router.deliver([TokenOutput("b", count, None), TokenOutput("c", count, None)])
    assert router.full(2) == {"b", "c"}
    assert router.full(3) == {"b", "c"}
    assert router.full(4) == set()
    router.take("b")
    assert router.full(3) == {"c"}


def test_mailbox_is_forgotten_when_nobody_has_emptied_it_for_long(clock: SimpleNamespace) -> None:
    router = opened("a", "b")
    clock.now += 50
    router.take("b")
    assert router.forget(60) == []
    clock.now += 11
    assert router.forget(60) == ["a"]
    assert router.forget(60) == []
    assert router.wait(0)


@pytest.mark.parametrize("stream_interval", [0, 1000])
def test_mailbox_that_somebody_waits_for_is_not_forgotten(clock: SimpleNamespace, stream_interval: float) -> None:
    """However long a prompt takes, or tokens are held back."""
    router = TokenRouter(stream_interval)
    router.open("a")
    if stream_interval:
        router.deliver([TokenOutput("a", 1, None)])
        assert router.wait(0) and router.take("a").token_ids == [1]
        router.deliver([TokenOutput("a", 2, None)])
    for _ in range(5):
        clock.now += 50
        assert not router.wait(0)
        assert router.forget(60) == []
    clock.now += 61
    assert router.forget(60) == ["a"]


def test_forgotten_mailbox_has_an_error_for_a_reader_who_comes_back(clock: SimpleNamespace) -> None:
    router = TokenRouter()
    router.open("a", 1000.0)
    router.open("finished")
    router.deliver([TokenOutput("a", 1, None), TokenOutput("finished", 2, "stop")])
    clock.now += 61
    assert router.forget(60) == ["a", "finished"]
    assert router.take("a") == Delivery([1], error="nobody has read the answer for 60 s", fault="time")
    assert router.take("finished") == Delivery([2], "stop")
    clock.now += 1000
    assert router.expire() == []  # it has failed already


def test_delivery_does_not_make_a_forgotten_mailbox_remembered(clock: SimpleNamespace) -> None:
    router = opened("a")
    clock.now += 61
    router.deliver([TokenOutput("a", 1, None)])
    assert router.forget(60) == ["a"]


def test_request_whose_time_is_over_fails_once(clock: SimpleNamespace) -> None:
    router = TokenRouter()
    for name, seconds in (("short", 5.0), ("long", 50.0), ("endless", None), ("done", 5.0)):
        router.open(name, seconds)
    router.deliver([TokenOutput("done", 1, "length"), TokenOutput("short", 1, None)])
    clock.now += 4
    assert router.expire() == []
    clock.now += 1
    assert router.expire() == ["short"]
    assert router.expire() == []
    assert router.wait(0)
    failed = router.take("short")
    assert failed == Delivery([1], error="the request took longer than its 5 s", fault="time")
    assert failed.is_last
    assert router.take("done") == Delivery([1], "length")
    router.close("long")
    clock.now += 1000
    assert router.expire() == []


def test_logprobs_come_along_with_their_tokens() -> None:
    router, logprobs = opened("a"), TokenLogprobs(-1.5, ((3, -0.5),))
    router.deliver([TokenOutput("a", 1, None, logprobs)])
    assert router.take("a") == Delivery([1], logprobs=[logprobs])


def test_answer_that_cannot_go_on_is_an_error_of_its_form() -> None:
    router = opened("a")
    router.deliver([TokenOutput("a", 1, "stop", error="too complex")])
    assert router.take("a") == Delivery([1], error="too complex", fault="form")


def test_request_without_a_token_to_choose_ends_with_an_error_of_the_engine() -> None:
    router = opened("a")
    router.deliver([TokenOutput("a", 1, None)])
    router.deliver([TokenOutput("a", None, None, error="NaN", fault="engine")])
    assert router.take("a") == Delivery([1], error="NaN", fault="engine")


def test_reserved_mailbox_is_not_forgotten_and_its_time_runs(clock: SimpleNamespace) -> None:
    router = TokenRouter()
    router.reserve("a")
    assert router.num_open == 1 and router.is_open("a") and not router.wait(0)
    clock.now += 100
    assert router.forget(60) == [] and router.take("a") == Delivery()
    router.open("a", 120)
    router.open("a/1", 120, beside="a")
    router.open("b", 120)
    clock.now += 21
    assert router.expire() == ["a", "a/1"]
    assert router.forget(20) == ["a", "a/1", "b"]


def test_mailbox_whose_request_is_spoken_of_is_looked_at_once() -> None:
    router = TokenRouter(stream_interval=30)
    router.reserve("a")
    router.tell("a")
    router.tell("gone")
    assert router.wait(0) and router.take("a") == Delivery(is_told=True)
    assert not router.wait(0)
