"""`ts-parallel complete` against a small server: prompts, chats, errors, Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from sse_server import Refusal, chat, event, running, steady
from typer.testing import CliRunner

from ts_parallel.cli.main import app

# pytest may itself run where Ctrl-C is ignored, as a shell's background job does, and children inherit that.
PROGRAM = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from ts_parallel.cli.main import main; main()"
)


def run(*arguments: str, text: str | None = None) -> Any:
    """A call in this process; an error that `main` would print is `exception` of what is returned."""
    return CliRunner(env={"OPENAI_API_KEY": None}).invoke(app, ["complete", *arguments], input=text)


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", PROGRAM, "complete", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_answer_is_printed_and_only_what_was_given_is_sent() -> None:
    with running(completions=steady()) as server:
        result = run(server.url, "Return a", "--max-tokens", "3")
        assert server.bodies == [{"model": "demo", "prompt": "Return a", "max_tokens": 3, "stream": True}]
        assert server.keys == [None]
    assert (result.exit_code, result.stdout) == (0, "t0 t1 t2 \n")


def test_sampling_model_and_key_are_sent() -> None:
    options = "--temperature 0.5 --top-p 0.9 --seed 7 --max-tokens 2 --model other --api-key k".split()
    with running(completions=steady()) as server:
        assert run(server.url, "x", *options).exit_code == 0
        sent = {"model": "other", "prompt": "x", "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "seed": 7}
        assert server.bodies == [{**sent, "stream": True}]
        assert server.keys == ["Bearer k"]


def test_key_comes_from_the_environment() -> None:
    with running(completions=steady()) as server:
        arguments = ["complete", server.url, "x", "--max-tokens", "1"]
        assert CliRunner(env={"OPENAI_API_KEY": "e"}).invoke(app, arguments).exit_code == 0
        assert server.keys == ["Bearer e"]


def test_prompt_is_read_from_standard_input_less_one_line_end() -> None:
    with running(completions=steady()) as server:
        assert run(server.url, text="two\nlines\n\n").exit_code == 0
        assert server.bodies[0]["prompt"] == "two\nlines\n"
        assert server.bodies[0]["max_tokens"] == 128


def test_empty_prompt_is_refused() -> None:
    with running(completions=steady()) as server:
        assert str(run(server.url, text="\n").exception) == "the prompt is empty"
        assert server.bodies == []


def test_pieces_are_shown_as_they_come() -> None:
    with running(completions=steady(gap=0.05)) as server:
        with started(server.url, "x", "--max-tokens", "400") as process:
            assert process.stdout is not None
            assert process.stdout.read(3) == "t0 "
            assert server.num_running == 1


def test_server_error_is_one_line_and_status_1() -> None:
    def refusing(body: dict[str, Any]) -> Iterator[bytes]:
        raise Refusal(400, "there is room for\n5", "max_tokens")
        yield b""

    with running(completions=refusing) as server, started(server.url, "x") as process:
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (1, "")
    assert errors == "ts-parallel: the server answered 400 to completions: there is room for 5\n"


def test_error_in_the_middle_stands_on_a_line_of_its_own() -> None:
    def breaking(body: dict[str, Any]) -> Iterator[bytes]:
        yield from list(steady()(body))[:2]
        yield event({"error": {"message": "the engine failed"}})

    with running(completions=breaking) as server:
        result = run(server.url, "x", "--max-tokens", "4")
    assert result.stdout == "t0 t1 \n"
    assert str(result.exception) == "the engine failed"


def test_chat_sends_every_turn_before_as_history() -> None:
    with running(chat=chat("Hel", "lo")) as server:
        result = run(server.url, "--chat", text="one\n\n  \ntwo\n")
        messages = [body["messages"] for body in server.bodies]
        assert "max_tokens" not in server.bodies[0]
    assert (result.exit_code, result.stdout) == (0, "Hello\nHello\n")
    said = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "Hello"}]
    assert messages == [said[:1], [*said, {"role": "user", "content": "two"}]]


def test_prompt_of_a_chat_is_its_first_turn() -> None:
    with running(chat=chat("Hello")) as server:
        assert run(server.url, "first", "--chat", text="second\n").exit_code == 0
        assert [body["messages"][-1]["content"] for body in server.bodies] == ["first", "second"]


def test_chat_without_the_route_says_so() -> None:
    with running(completions=steady()) as server:
        result = run(server.url, "--chat", text="one\ntwo\n")
        assert len(server.bodies) == 1
    assert result.exit_code == 1
    assert "no chat there, leave out --chat to complete a prompt" in str(result.exception)
    assert "404" in str(result.exception)


def test_refused_turn_leaves_no_trace_and_the_status_tells() -> None:
    def answer(body: dict[str, Any]) -> Iterator[bytes]:
        if body["messages"][-1]["content"] == "bad":
            raise Refusal(400, "not this")
        yield from chat("fine")(body)

    with running(chat=answer) as server:
        result = run(server.url, "--chat", text="bad\ngood\n")
        assert server.bodies[1]["messages"] == [{"role": "user", "content": "good"}]
    assert (result.exit_code, result.stdout) == (1, "fine\n")
    assert result.stderr == "ts-parallel: the server answered 400 to chat/completions: not this\n"


def test_ctrl_c_ends_the_answer() -> None:
    with running(completions=steady(gap=0.02)) as server:
        with started(server.url, "x", "--max-tokens", "1000") as process:
            assert process.stdout is not None and process.stderr is not None
            assert process.stdout.read(3) == "t0 "
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
            assert process.stderr.read() == ""
        assert server.has_left.wait(5)


def test_ctrl_c_ends_an_answer_of_a_chat_and_the_next_one_the_command() -> None:
    def answer(body: dict[str, Any]) -> Iterator[bytes]:
        texts = ("short",) if len(body["messages"]) > 1 else ("long",) * 1000
        for number, piece in enumerate(chat(*texts)(body)):
            time.sleep(0.02 * (number > 0))
            yield piece

    with running(chat=answer) as server, started(server.url, "--chat") as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        print("one", file=process.stdin, flush=True)
        assert process.stdout.read(4) == "long"
        process.send_signal(signal.SIGINT)
        assert server.has_left.wait(20)
        print("two", file=process.stdin, flush=True)
        assert process.stdout.readline().strip("long") == "\n"
        assert process.stdout.readline() == "short\n"
        _, partial, last = server.bodies[1]["messages"]
        assert partial["content"].startswith("long") and last["content"] == "two"
        assert interrupt_until_it_ends(process) == 130
        assert process.stderr.read() == ""


def interrupt_until_it_ends(process: subprocess.Popen[str]) -> int:
    """The status. The answer's last line is read a little before the command waits for the next question: a first
    signal may still be the answer's."""
    for _ in range(10):
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            return process.wait(2)
    raise AssertionError("it does not end")


@pytest.mark.parametrize("option", ["--max-tokens=0", "--temperature=-1", "--top-p=1.5", "--seed=-1"])
def test_value_that_cannot_be_is_refused_before_anything_is_asked(option: str) -> None:
    with running(completions=steady()) as server:
        assert run(server.url, "x", option).exit_code == 2
        assert server.bodies == []
