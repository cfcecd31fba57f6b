"""`ts-parallel complete --chat` as somebody at a terminal uses it: messages of several lines, commands, thoughts."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from sse_server import END, Refusal, chat, event, running, steady
from typer.testing import CliRunner

from ts_parallel.cli.main import app


@dataclass
class Terminal:
    """Both ends of one: what is typed is not shown again."""

    process: subprocess.Popen[bytes]
    own_end: int
    shown: str = ""

    def type(self, line: str) -> None:
        os.write(self.own_end, f"{line}\n".encode())

    def wait_for(self, text: str) -> str:
        """All that has been shown up to `text`, which is forgotten."""
        deadline = time.monotonic() + 60
        while text not in self.shown:
            assert time.monotonic() < deadline and self.process.poll() is None, self.shown
            self.shown += os.read(self.own_end, 4096).decode().replace("\r\n", "\n")
        before, _, self.shown = self.shown.partition(text)
        return before


@contextmanager
def at_a_terminal(url: str, *options: str, **environment: str) -> Iterator[Terminal]:
    own_end, its_end = pty.openpty()
    settings = termios.tcgetattr(its_end)
    settings[3] &= ~termios.ECHO
    termios.tcsetattr(its_end, termios.TCSANOW, settings)
    own = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "OPENAI_API_KEY")}
    command = [sys.executable, "-c", "from ts_parallel.cli.main import main; main()", "complete", url, "--chat"]
    streams: Any = dict.fromkeys(("stdin", "stdout", "stderr"), its_end)
    process = subprocess.Popen([*command, *options], env={**own, **environment}, start_new_session=True, **streams)
    os.close(its_end)
    try:
        yield Terminal(process, own_end)
    finally:
        process.kill()
        process.wait(20)
        os.close(own_end)


def run(url: str, text: str, *options: str) -> Any:
    """A chat whose input is no terminal."""
    arguments = ["complete", url, "--chat", *options]
    return CliRunner(env={"OPENAI_API_KEY": None}).invoke(app, arguments, input=text)


def asked(server: Any) -> list[Any]:
    return [[(own["role"], own["content"]) for own in body["messages"]] for body in server.bodies]


def thinking(field: str) -> Any:
    def answer(_: dict[str, Any]) -> Iterator[bytes]:
        for delta in ({"role": "assistant"}, {field: "so "}, {field: "it is"}, {"content": "yes"}, {"content": "!"}):
            yield event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        yield event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        yield END

    return answer


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_thoughts_are_dimmed_on_a_terminal_and_are_no_part_of_the_answer(field: str) -> None:
    with running(chat=thinking(field)) as server, at_a_terminal(server.url) as terminal:
        terminal.wait_for("> ")
        terminal.type("is it?")
        assert terminal.wait_for("> ") == "\x1b[2mso it is\x1b[0m\n\nyes!\n"
        terminal.type("sure?")
        terminal.wait_for("> ")
        assert asked(server)[1] == [("user", "is it?"), ("assistant", "yes!"), ("user", "sure?")]


def test_thoughts_are_plain_where_no_colour_is_wanted_and_left_out_of_a_file() -> None:
    with running(chat=thinking("reasoning")) as server:
        with at_a_terminal(server.url, NO_COLOR="1") as terminal:
            terminal.wait_for("> ")
            terminal.type("is it?")
            assert terminal.wait_for("> ") == "so it is\n\nyes!\n"
        assert run(server.url, "is it?\n").stdout == "yes!\n"


def test_answer_that_ends_in_thoughts_leaves_no_dim_terminal() -> None:
    def answer(_: dict[str, Any]) -> Iterator[bytes]:
        yield event({"choices": [{"index": 0, "delta": {"reasoning": "so"}, "finish_reason": "length"}]})
        yield END

    with running(chat=answer) as server, at_a_terminal(server.url) as terminal:
        terminal.wait_for("> ")
        terminal.type("is it?")
        assert terminal.wait_for("> ") == "\x1b[2mso\x1b[0m\n"


def test_message_of_several_lines_is_asked_for_line_by_line() -> None:
    with running(chat=chat("ok")) as server, at_a_terminal(server.url, "--system", "Be brief.") as terminal:
        terminal.wait_for("> ")
        terminal.type("one\\")
        terminal.wait_for(". ")
        terminal.type("two")
        assert terminal.wait_for("> ") == "ok\n"
        terminal.type('"""def f():')
        terminal.wait_for(". ")
        terminal.type("")
        terminal.wait_for(". ")
        terminal.type('    pass"""')
        terminal.wait_for("> ")
        terminal.type("/quit")
        assert terminal.process.wait(20) == 0
        assert asked(server)[-1] == [
            ("system", "Be brief."),
            ("user", "one\ntwo"),
            ("assistant", "ok"),
            ("user", "def f():\n\n    pass"),
        ]


@pytest.mark.parametrize(
    ("typed", "messages"),
    [
        ("one\\\ntwo\\\n", ["one\ntwo\n"]),
        ("C:\\\\\nnext\n", ["C:\\\\", "next"]),
        ('"""a "quoted" line"""\n"""\nb\n\nc\n"""\n', ['a "quoted" line', "b\n\nc"]),
        ('"""never\nclosed\n', ["never\nclosed"]),
        ('""""""\n  \na\n', ["a"]),
    ],
)
def test_lines_become_messages(typed: str, messages: list[str]) -> None:
    with running(chat=chat("ok")) as server:
        assert run(server.url, typed).exit_code == 0
        assert [body["messages"][-1]["content"] for body in server.bodies] == messages


def test_commands_change_what_is_sent() -> None:
    said = ["a", "/system Be brief.", "b", "/clear", "c", "/system", "d"]
    with running(chat=chat("ok")) as server:
        assert run(server.url, "\n".join(said)).exit_code == 0
        assert asked(server) == [
            [("user", "a")],
            [("system", "Be brief."), ("user", "a"), ("assistant", "ok"), ("user", "b")],
            [("system", "Be brief."), ("user", "c")],
            [("user", "c"), ("assistant", "ok"), ("user", "d")],
        ]


def test_retry_asks_the_last_question_in_place_of_its_answer() -> None:
    with running(chat=chat("ok")) as server:
        result = run(server.url, "/retry\na\nb\n/retry\n/retry\n/clear\n/retry\n")
        assert asked(server) == [[("user", "a")], *3 * [[("user", "a"), ("assistant", "ok"), ("user", "b")]]]
    assert result.stderr.count("nothing was asked yet") == 2


def test_retry_after_a_refusal_takes_no_earlier_turn_back() -> None:
    def answer(body: dict[str, Any]) -> Iterator[bytes]:
        if len(server.bodies) == 2:
            raise Refusal(503, "not now")
        yield from chat("ok")(body)

    with running(chat=answer) as server:
        assert run(server.url, "a\na\n/retry\n").exit_code == 1
        assert asked(server)[1:] == 2 * [[("user", "a"), ("assistant", "ok"), ("user", "a")]]


def test_help_lists_the_commands_and_quit_ends() -> None:
    with running(chat=chat("ok")) as server:
        result = run(server.url, "/help\n/quit\nnever asked\n")
        assert server.bodies == [] and result.exit_code == 0
    assert all(name in result.stderr for name in ("/clear", "/system", "/retry", "/help", "/quit"))


@pytest.mark.parametrize("line", ["/claer", "/foo", "/systen Be brief."])
def test_misspelt_command_is_not_asked(line: str) -> None:
    with running(chat=chat("ok")) as server:
        assert "no command" in run(server.url, f"{line}\n").stderr
        assert server.bodies == []


def test_path_is_no_command() -> None:
    with running(chat=chat("ok")) as server:
        run(server.url, "/etc/hosts has which lines?\n")
        assert asked(server) == [[("user", "/etc/hosts has which lines?")]]


def test_system_message_without_a_chat_is_refused() -> None:
    with running(completions=steady()) as server:
        result = CliRunner().invoke(app, ["complete", server.url, "x", "--system", "s"])
        assert "--system is for chats" in str(result.exception) and server.bodies == []
