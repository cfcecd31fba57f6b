"""The page in a real Chromium: a chat that streams, stops, folds what is thought and called, and shows text as text."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import sse_server
from gateway_process import Gateway, gateway
from playwright.sync_api import Browser, Page, expect, sync_playwright
from sse_server import END, Recorder, Refusal, event, whole

KEY = "secret"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)")
SCREENSHOT = os.environ.get("TS_PARALLEL_SCREENSHOT")
"""A file to draw README's picture into."""


@pytest.fixture(scope="module")
def recorder() -> Iterator[Recorder]:
    with sse_server.running(chat=whole({})) as recorder:
        yield recorder


@pytest.fixture(scope="module")
def front(recorder: Recorder) -> Iterator[Gateway]:
    with gateway(f"{recorder.url.removesuffix('/v1')}/predictions/demo") as front:
        yield front


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, front: Gateway) -> Iterator[Page]:
    """Open, with its models listed. What it complains of, and what it asks of others, fails the test."""
    page = browser.new_page(viewport={"width": 900, "height": 700})
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda own: None if own.url.startswith(front.url) else complaints.append(own.url))
    page.goto(front.url)
    expect(page.locator("#model")).to_have_value("demo")
    yield page
    page.close()
    assert [own for own in complaints if "favicon" not in own and "status of 4" not in own] == []


def delta(**fields: Any) -> bytes:
    reason = fields.pop("finish_reason", None)
    usage = {"prompt_tokens": 5, "completion_tokens": fields.pop("tokens", 1)}
    return event({"choices": [{"index": 0, "delta": fields, "finish_reason": reason}], "usage": usage})


def says(recorder: Recorder, *pieces: bytes) -> None:
    recorder.answers["chat"] = lambda _: iter((*pieces, END))


def send(page: Page, text: str) -> None:
    page.locator("#text").fill(text)
    page.locator("#text").press("Enter")


def test_page_allows_nothing_from_elsewhere(front: Gateway) -> None:
    for path in ("", "page.js", "page.css"):
        got = httpx.get(f"{front.url}/{path}")
        assert got.status_code == 200
        policy = got.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert "http" not in got.text and "innerHTML" not in got.text
        assert got.headers["x-content-type-options"] == "nosniff"


def test_page_opens_without_a_key_and_asks_with_one(recorder: Recorder) -> None:
    with gateway(f"{recorder.url.removesuffix('/v1')}/predictions/demo", TS_PARALLEL_API_KEY=KEY) as guarded:
        assert httpx.get(guarded.url).status_code == 200
        assert httpx.get(f"{guarded.url}/v1/models").status_code == 401


@in_chromium
def test_answer_streams_and_says_how_fast_it_came(page: Page, recorder: Recorder) -> None:
    may_end = threading.Event()

    def answer(_: dict[str, Any]) -> Iterator[bytes]:
        yield delta(role="assistant", content="Hello")
        assert may_end.wait(20)
        yield delta(content=" there", tokens=9, finish_reason="length")
        yield END

    recorder.answers["chat"] = answer
    send(page, "Hi")
    expect(page.locator(".assistant .text")).to_have_text("Hello")
    expect(page.locator("#stop")).to_be_visible()
    may_end.set()
    expect(page.locator(".assistant .text")).to_have_text("Hello there")
    expect(page.locator(".figures")).to_contain_text("9 tokens · first after")
    expect(page.locator(".figures")).to_contain_text("tokens/s · ended by length")
    expect(page.locator("#stop")).to_be_hidden()


@in_chromium
def test_conversation_goes_on_with_the_settings(page: Page, recorder: Recorder) -> None:
    says(recorder, delta(content="One", finish_reason="stop"))
    page.locator("#settings summary").click()
    page.locator("#temperature").fill("0.5")
    page.locator("#max_tokens").fill("7")
    page.locator("#system").fill("Be brief.")
    send(page, "First")
    expect(page.locator(".assistant .text")).to_have_text("One")
    send(page, "Second")
    expect(page.locator(".assistant .text")).to_have_count(2)
    sent = recorder.bodies[-1]
    assert [own["content"] for own in sent["messages"]] == ["Be brief.", "First", "One", "Second"]
    assert (sent["temperature"], sent["max_tokens"], sent["model"]) == (0.5, 7, "demo")
    page.locator("#new").click()
    expect(page.locator(".message")).to_have_count(0)
    send(page, "Third")
    expect(page.locator(".assistant .text")).to_have_text("One")
    assert [own["content"] for own in recorder.bodies[-1]["messages"]] == ["Be brief.", "Third"]


@in_chromium
def test_text_of_a_model_is_text_and_never_markup(page: Page, recorder: Recorder) -> None:
    evil = "<img src=x onerror=\"document.title='stolen'\"><script>document.title='stolen'</script>&lt;b&gt;"
    says(
        recorder,
        delta(reasoning_content=evil),
        delta(content=evil),
        delta(tool_calls=[{"index": 0, "id": "c", "function": {"name": evil, "arguments": evil}}]),
        delta(finish_reason="tool_calls"),
    )
    send(page, evil)
    expect(page.locator(".assistant > .text")).to_have_text(evil)
    expect(page.locator(".user .text")).to_have_text(evil)
    expect(page.locator(".call .text")).to_have_text(evil)
    assert page.locator("main img, main script, main b").count() == 0
    assert page.title() == "ts_parallel"


@in_chromium
def test_reasoning_and_calls_are_folded_and_results_go_back(page: Page, recorder: Recorder) -> None:

    def slowly(*pieces: bytes) -> Iterator[bytes]:
        for piece in pieces:
            yield piece
            recorder.stop.wait(0.1)

    recorder.answers["chat"] = lambda _: slowly(
        delta(reasoning_content="I should multiply.", tokens=5),
        delta(tool_calls=[{"index": 0, "id": "c1", "function": {"name": "mul", "arguments": '{"a": 3, '}}], tokens=12),
        delta(tool_calls=[{"index": 0, "function": {"arguments": '"b": 4}'}}], tokens=18),
        delta(finish_reason="tool_calls", tokens=24) + END,
    )
    page.locator("#settings summary").click()
    page.locator("#tools").fill('[{"type": "function", "function": {"name": "mul"}}]')
    page.locator("#settings summary").click()
    send(page, "3 × 4?")
    thought, call = page.locator(".reasoning"), page.locator(".call")
    expect(call.locator("summary")).to_have_text("Call of mul")
    expect(call.locator(".text")).to_be_hidden()
    expect(thought.locator(".text")).to_be_hidden()
    thought.locator("summary").click()
    call.locator("summary").click()
    expect(thought.locator(".text")).to_have_text("I should multiply.")
    expect(call.locator(".text")).to_have_text('{"a": 3, "b": 4}')

    words = [delta(content=word, tokens=at) for at, word in enumerate(("3", " × 4", " is", " 12."), 1)]
    recorder.answers["chat"] = lambda _: slowly(*words, delta(finish_reason="stop", tokens=7) + END)
    page.get_by_label("Result of mul").fill("12")
    page.get_by_role("button", name="Answer").click()
    expect(page.locator(".assistant").nth(1).locator(".text")).to_have_text("3 × 4 is 12.")
    sent = recorder.bodies[-1]
    assert sent["tools"][0]["function"]["name"] == "mul"
    assert sent["messages"][-1] == {"role": "tool", "tool_call_id": "c1", "content": "12"}
    assert sent["messages"][-2]["tool_calls"][0]["function"] == {"name": "mul", "arguments": '{"a": 3, "b": 4}'}
    if SCREENSHOT:
        page.locator("#text").blur()
        page.screenshot(path=Path(SCREENSHOT))


@in_chromium
def test_stop_ends_the_models_work_and_keeps_what_was_said(page: Page, recorder: Recorder) -> None:
    def endless(_: dict[str, Any]) -> Iterator[bytes]:
        while True:
            yield delta(content="on and ")
            recorder.stop.wait(0.02)

    recorder.answers["chat"] = endless
    recorder.has_left.clear()
    send(page, "Go")
    expect(page.locator(".assistant .text")).to_contain_text("on and on")
    page.locator("#stop").click()
    expect(page.locator(".failed")).to_have_text("Stopped.")
    assert recorder.has_left.wait(20)
    said = page.locator(".assistant .text").text_content()
    says(recorder, delta(content="Yes", finish_reason="stop"))
    send(page, "More?")
    expect(page.locator(".assistant").nth(1).locator(".text")).to_have_text("Yes")
    assert recorder.bodies[-1]["messages"][1] == {"role": "assistant", "content": said}


@in_chromium
def test_refusal_and_broken_tools_are_shown_in_words(page: Page, recorder: Recorder) -> None:
    def refuse(_: dict[str, Any]) -> Iterator[bytes]:
        raise Refusal(400, "temperature: too hot")
        yield

    recorder.answers["chat"] = refuse
    send(page, "Hi")
    expect(page.locator(".failed")).to_have_text("temperature: too hot")
    page.locator("#settings summary").click()
    page.locator("#tools").fill("[")
    send(page, "Hi")
    expect(page.locator("#notice")).to_contain_text("The tools are no JSON")


@in_chromium
def test_page_is_dark_where_the_system_is(page: Page) -> None:
    colors = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colors[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colors == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 24, 29)"}


@in_chromium
def test_key_is_sent_once_it_is_given(browser: Browser, recorder: Recorder) -> None:
    with gateway(f"{recorder.url.removesuffix('/v1')}/predictions/demo", TS_PARALLEL_API_KEY=KEY) as guarded:
        page = browser.new_page()
        page.goto(guarded.url)
        expect(page.locator("#notice")).to_contain_text("no API key")
        page.locator("#settings summary").click()
        page.locator("#key").fill(KEY)
        page.locator("#key").blur()
        expect(page.locator("#model")).to_have_value("demo")
        expect(page.locator("#notice")).to_be_hidden()
        says(recorder, delta(content="Hello", finish_reason="stop"))
        send(page, "Hi")
        expect(page.locator(".assistant .text")).to_have_text("Hello")
        page.close()


@in_chromium
def test_models_that_do_not_chat_are_not_offered(browser: Browser, recorder: Recorder) -> None:
    with sse_server.running() as batch:
        batch.card["task"] = "text_embedding"
        upstreams = [f"{own.url.removesuffix('/v1')}/predictions/demo" for own in (batch, recorder)]
        with gateway(f"vectors={upstreams[0]}", f"chat={upstreams[1]}") as both, gateway(upstreams[0]) as lonely:
            page = browser.new_page()
            page.goto(both.url)
            expect(page.locator("#model option")).to_have_text(["chat"])
            page.goto(lonely.url)
            expect(page.locator("#notice")).to_have_text("No model here generates text.")
            page.close()
