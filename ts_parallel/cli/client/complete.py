"""`ts-parallel complete`: one answer, or a chat, streamed to the terminal from a running server."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Annotated, Any

import typer

from ts_parallel.cli.client.remote import URL, APIKey, ServedModel, Timeout, base_url, find_model
from ts_parallel.cli.client.stream_client import Client, Piece, RemoteError
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
        bool, typer.Option("--chat", help="Read lines until the end of input, each a turn of one conversation.")
    ] = False,
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
) -> None:
    """Stream an answer as it comes. Ctrl-C ends the answer, a second one (or one between answers) the command."""
    client = Client(base_url(url), api_key, timeout)
    if max_tokens is None and not chat:
        max_tokens = _MAX_TOKENS
    if prompt is None and not chat:
        prompt = _read_prompt()
    if not prompt and not chat:
        raise ConfigError("the prompt is empty")
    settings = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    body = {
        "model": model or find_model(client),
        **{key: value for key, value in settings.items() if value is not None},
    }
    if chat:
        raise typer.Exit(converse(client, body, prompt))
    _, is_interrupted = show(client.complete({**body, "prompt": prompt}))
    raise typer.Exit(_INTERRUPTED if is_interrupted else 0)


def converse(client: Client, body: dict[str, Any], first: str | None) -> int:
    """Answer `first`, where it is given, and each line of standard input until its end, the turns before as history.

    A turn that the server refuses is said on standard error and leaves no trace in the history; of an answer that
    Ctrl-C ended, the history keeps what had come.

    Returns:
        The exit status: 1 where a turn was refused.

    Raises:
        RemoteError: the server cannot be reached, has no chat, or failed in the middle of an answer.
    """
    history: list[dict[str, str]] = []
    status = 0
    for line in _lines(first):
        question = {"role": "user", "content": line}
        try:
            answer, _ = show(client.chat({**body, "messages": [*history, question]}))
        except RemoteError as error:
            if error.status in _NO_SUCH_ROUTE:
                raise RemoteError(
                    f"no chat there, leave out --chat to complete a prompt: {error}", error.status
                ) from None
            if error.status is None:
                raise
            print(f"ts-parallel: {error}", file=sys.stderr)
            status = 1
            continue
        if answer:
            history += [question, {"role": "assistant", "content": answer}]
    return status


def show(pieces: Generator[Piece, None, None]) -> tuple[str, bool]:
    """Print an answer as it comes, closed by a line end; returns its text and whether Ctrl-C ended it."""
    texts: list[str] = []
    try:
        # Closed here and not by the garbage collector, so that the server hears at once that nobody reads on.
        with closing(pieces):
            for piece in pieces:
                texts.append(piece.text)
                print(piece.text, end="", flush=True)
    except KeyboardInterrupt:
        print()
        return "".join(texts), True
    except RemoteError:
        if texts:
            print()
        raise
    print()
    return "".join(texts), False


def _read_prompt() -> str:
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is no text: {error}") from None


def _lines(first: str | None) -> Iterator[str]:
    """The turns of whoever types; a mark asks for each where that is a person."""
    if first:
        yield first
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise ConfigError(f"standard input is no text: {error}") from None
        if line.strip():
            yield line
