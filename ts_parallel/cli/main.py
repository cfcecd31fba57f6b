"""`ts-parallel plan | convert | verify | archive | serve | complete | bench`."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable

import typer

from ts_parallel.cli.client.bench import bench
from ts_parallel.cli.client.complete import complete
from ts_parallel.cli.convert import convert
from ts_parallel.cli.plan import plan
from ts_parallel.cli.server.archive import archive
from ts_parallel.cli.server.serve import serve
from ts_parallel.cli.verify import verify
from ts_parallel.errors import TSParallelError


def summary_of(command: Callable[..., None]) -> str:
    """Its first paragraph, which would else be cut after so many letters."""
    return (inspect.getdoc(command) or "").partition("\n\n")[0]


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut names and texts short where a terminal is narrow, or none is there
    help=__doc__,
)
for command in (plan, convert, verify, archive, serve, complete, bench):
    app.command(short_help=summary_of(command))(command)


def main() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except TSParallelError as error:
        print(f"ts-parallel: {error}", file=sys.stderr)
        sys.exit(1)
