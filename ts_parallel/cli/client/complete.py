"""`ts-parallel complete`: one answer, or a chat, streamed to the terminal from a running server."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import closing
from itertools import chain
from typing import Annotated, Any

import typer

from ts_parallel.cli.client.remote import URL, APIKey, RetryFor, ServedModel, Timeout, base_url, find_model
from ts_parallel.cli.client.stream_client import Client, Patience, Piece, RemoteError
from ts_parallel.cli.client.talk.conversation import Conversation, command_of, help_text
from ts_parallel.cli.client.talk.shown import Shown
from ts_parallel.cli.client.talk.typed import messages
from ts_parallel.errors import ConfigError

_MAX_TOKENS = 128  # of a completion; OpenAI's own default of 16 ends most answers midway
_NO_SUCH_ROUTE = (404, 405, 501)
_INTERRUPTED = 130  # what shells report of a command that Ctrl-C ended


def complete(
    url: URL,
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to complete, by default standard input up to its end, less one last line end."),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Read lines until the end of input, each a turn of one conversation; /help tells."),
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="What the model is told before the first turn of a chat: its system message.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help=f"Most tokens of an answer, by default {_MAX_TOKENS}; in a chat the server's."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="By default the server's.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="By default the server's.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes a sampled answer one that can be had again.")] = None,
    model: ServedModel = None,
    api_key: APIKey = None,
    timeout: Timeout = 600.0,
    retry_for: RetryFor = 60.0,
) -> None:
    """Stream an answer as it comes. Ctrl-C ends the answer, a second one (or one between answers) the command."""
    client = Client(base_url(url), api_key, timeout, Patience(retry_for, _say_again))
    if max_tokens is None and not chat:
        max_tokens = _MAX_TOKENS
    if prompt is None and not chat:
        prompt = _read_prompt()
    if not prompt and not chat:
        raise ConfigError("the prompt is empty")
    if system is not None and not chat:
        raise ConfigError("--system is for chats: give --chat too")
    settings = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    body = {
        "model": model or find_model(client),
        **{key: value for key, value in settings.items() if value is not None},
    }
    if chat:
        raise typer.Exit(converse(client, body, prompt, system))
    _, is_interrupted = show(client.complete({**body, "prompt": prompt}))
    raise typer.Exit(_INTERRUPTED if is_interrupted else 0)


def converse(client: Client, body: dict[str, Any], first: str | None, system: str | None = None) -> int:
    """Answer `first`, where it is given, and each message of standard input until its end, the turns before as history.

    A turn that the server refuses is said on standard error and leaves no trace in the history; of an answer that
    Ctrl-C ended, the history keeps what had come.

    Returns:
        The exit status: 1 where a turn was refused.

    Raises:
        RemoteError: the server cannot be reached, has no chat, or failed in the middle of an answer.
    """
    conversation = Conversation(system)
    status = 0
    for message in chain([first] if first else [], messages()):
        try:
            question = _question(message, conversation)
        except _End:
            break
        if question is None:
            continue
        try:
            answer, _ = show(client.chat({**body, "messages": conversation.ask(question)}))
        except RemoteError as error:
            if error.status in _NO_SUCH_ROUTE:
                raise RemoteError(
                    f"no chat there, leave out --chat to complete a prompt: {error}", error.status
                ) from None
            if error.status is None:
                raise
            _say(f"ts-parallel: {error}")
            status = 1
            continue
        conversation.answer(answer)
    return status


class _End(Exception):
    """Nothing more is to be asked."""


def _question(message: str, conversation: Conversation) -> str | None:
    """What is to be asked; None where a message was a command and that is all.

    Raises:
        _End: it was the command to end.
    """
    try:
        command = command_of(message)
    except ValueError as error:
        _say(f"ts-parallel: {error}")
        return None
    if command is None:
        return message
    name, text = command
    if name == "/quit":
        raise _End
    if name == "/retry":
        if (question := conversation.take_back()) is None:
            _say("ts-parallel: nothing was asked yet")
        return question
    if name == "/clear":
        conversation.clear()
    elif name == "/system":
        conversation.system = text or None
    else:
        _say(help_text())
    return None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say_again(error: RemoteError, seconds: float) -> None:
    _say(f"ts-parallel: {error}; asking again in {seconds:g} s")


def show(pieces: Generator[Piece, None, None]) -> tuple[str, bool]:
    """Print an answer as it comes, closed by a line end; returns its text and whether Ctrl-C ended it."""
    texts: list[str] = []
    shown = Shown()
    try:
        # Closed here and not by the garbage collector, so that the server hears at once that nobody reads on.
        with closing(pieces):
            for piece in pieces:
                texts.append(piece.text)
                shown.add(piece.text, piece.reasoning)
    except KeyboardInterrupt:
        shown.end()
        return "".join(texts), True
    except RemoteError:
        shown.break_off()
        raise
    shown.end()
    return "".join(texts), False


def _read_prompt() -> str:
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is no text: {error}") from None
