"""`ts-parallel gateway`: bare `/v1` before one or several models of TorchServe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ts_parallel.config import API_KEY_VARIABLE, check_origin, parse_api_keys, parse_bytes
from ts_parallel.errors import ConfigError
from ts_parallel.gateway.run import run
from ts_parallel.gateway.settings import GatewaySettings, parse_upstreams
from ts_parallel.machine import is_loopback


def gateway(
    upstream: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]URL",
            help="A model of TorchServe, such as demo=http://127.0.0.1:8080/predictions/demo; may be given several "
            "times. Without NAME it is called as TorchServe does.",
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar=API_KEY_VARIABLE, help="What clients have to send; several with commas between them."),
    ] = None,
    upstream_key_file: Annotated[
        Path | None, typer.Option(help="TorchServe's key_file.json, where it asks for a key.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="An origin whose pages may ask, or '*'; may be given several times.")
    ] = None,
    max_request_size: Annotated[
        str, typer.Option(help="Most bytes of a request's body, such as 64MiB; a larger one is answered with 413.")
    ] = "64MiB",
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds for which a model may say nothing while its answer is waited for.")
    ] = 600.0,
) -> None:
    """Answer OpenAI's and Anthropic's routes for one or several models of TorchServe, until Ctrl-C or SIGTERM."""
    keys = parse_api_keys(api_key)
    for origin in cors_origin or ():
        check_origin(origin)
    try:
        most_bytes: int = parse_bytes(max_request_size)
    except ValueError as error:
        raise ConfigError(f"--max-request-size: {error}") from None
    upstreams = parse_upstreams(upstream, upstream_key_file)
    settings = GatewaySettings(upstreams, keys, tuple(cors_origin or ()), most_bytes, timeout)
    if not keys and not is_loopback(host):
        print(f"anyone who reaches {host} may ask: no --api-key, no {API_KEY_VARIABLE}", file=sys.stderr)
    run(settings, host, port)
