"""`ts-parallel plan | convert | verify | archive | serve | complete | bench`."""

from __future__ import annotations

import os
import sys

import typer

from ts_parallel.cli.client.bench import bench
from ts_parallel.cli.client.complete import complete
from ts_parallel.cli.convert import convert
from ts_parallel.cli.plan import plan
from ts_parallel.cli.server.archive import archive
from ts_parallel.cli.server.serve import serve
from ts_parallel.cli.verify import verify
from ts_parallel.errors import TSParallelError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
for command in (plan, convert, verify, archive, serve, complete, bench):
    app.command()(command)


def main() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except TSParallelError as error:
        print(f"ts-parallel: {error}", file=sys.stderr)
        sys.exit(1)
