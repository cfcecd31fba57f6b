"""What the sub-commands that ask a running server share: their options, and how its URL and its model are found."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from ts_parallel.cli.client.stream_client import Client, RemoteError
from ts_parallel.config import ARCHIVE_VERSION
from ts_parallel.errors import ConfigError

_MOST_NAMES_SHOWN = 10

URL = Annotated[
    str,
    typer.Argument(
        metavar="URL",
        help="Base URL of any OpenAI-compatible server, such as http://127.0.0.1:8080/predictions/demo/1.0/v1, "
        "or the URL that `ts-parallel serve` prints.",
    ),
]
ServedModel = Annotated[
    str | None, typer.Option("--model", help="Name of the model to ask, by default the only one of v1/models.")
]
APIKey = Annotated[str | None, typer.Option("--api-key", envvar="OPENAI_API_KEY", help="Sent as a bearer token.")]
Timeout = Annotated[float, typer.Option(min=0.001, help="Seconds that one whole answer may take.")]


RetryFor = Annotated[
    float,
    typer.Option(
        min=0,
        help="Seconds for which a server is asked again that is busy (429) or being started (503, no connection).",
    ),
]


def base_url(url: str) -> str:
    """The base URL that is meant by `serve`'s URL of a model, by a bare `http://host:port`, or by a base URL itself."""
    url = url.rstrip("/")
    if re.fullmatch(r"https?://[^/]+", url):
        return f"{url}/v1"
    if re.fullmatch(r"https?://[^/]+/predictions/[^/]+", url):
        return f"{url}/{ARCHIVE_VERSION}/v1"
    return url


def find_model(client: Client) -> str:
    """The name of the one model that the server serves.

    Raises:
        ConfigError: it serves several, or does not say.
        RemoteError: it cannot be asked.
    """
    try:
        names = client.models()
    except RemoteError as error:
        if error.status is None:
            raise
        raise ConfigError(f"{error}; is that the base URL? If so, name the model with --model") from None
    if len(names) != 1:
        shown = ", ".join(names[:_MOST_NAMES_SHOWN]) + ", …" * (len(names) > _MOST_NAMES_SHOWN)
        raise ConfigError(f"{client.url} serves {len(names)} models: choose one with --model ({shown})")
    return names[0]
