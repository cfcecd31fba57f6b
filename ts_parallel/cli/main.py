"""`ts-parallel plan | convert | verify | archive | serve | gateway | complete | bench | doctor`."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from ts_parallel.errors import TSParallelError

COMMANDS = {
    "plan": "ts_parallel.cli.plan",
    "convert": "ts_parallel.cli.convert",
    "verify": "ts_parallel.cli.verify",
    "archive": "ts_parallel.cli.server.archive",
    "serve": "ts_parallel.cli.server.serve",
    "gateway": "ts_parallel.cli.server.gateway",
    "complete": "ts_parallel.cli.client.complete",
    "bench": "ts_parallel.cli.client.bench",
    "doctor": "ts_parallel.cli.doctor.doctor",
}
"""Each command → its module, whose function of that name it is."""


class _Commands(TyperGroup):
    """Imports a command's module once the command is asked for: of some, torch and transformers take seconds."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        function: Callable[..., None] = getattr(import_module(COMMANDS[cmd_name]), cmd_name)
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
        alone.command(cmd_name, short_help=summary_of(function))(function)
        return get_command(alone)


def summary_of(command: Callable[..., None]) -> str:
    """Its first paragraph, which would else be cut after so many letters."""
    return (inspect.getdoc(command) or "").partition("\n\n")[0]


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut names and texts short where a terminal is narrow, or none is there
    help=__doc__,
)


@app.callback()
def _all() -> None:
    """The commands are found by name."""


def main() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except TSParallelError as error:
        print(f"ts-parallel: {error}", file=sys.stderr)
        sys.exit(1)
