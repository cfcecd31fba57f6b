"""What `--help` says is readable whole, however narrow the terminal is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from ts_parallel.cli import main
from ts_parallel.cli.main import app

COMMAND = str(Path(sys.executable).parent / "ts-parallel")
GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = {name: GROUP.get_command(None, name) for name in main.COMMANDS}


def without_spaces(text: str) -> str:
    """Lines are broken between words, and after hyphens."""
    return "".join(text.split())


def shows_all_of(output: str, command: Any) -> bool:
    names = {name for each in command.params for name in (*each.opts, *each.secondary_opts) if name.startswith("-")}
    words = {word.rstrip(",") for word in output.split()}
    texts = [each.help for each in command.params if each.help]
    return names <= words and all(without_spaces(text) in without_spaces(output) for text in texts)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_readable_whole_in_80_columns(name: str) -> None:
    output = CliRunner(env={"COLUMNS": "80"}).invoke(app, [name, "--help"]).output
    assert shows_all_of(output, COMMANDS[name])
    assert max(map(len, output.splitlines())) <= 80


def test_every_option_is_readable_whole_in_a_pipe() -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "FORCE_COLOR")}
    result = subprocess.run([COMMAND, "serve", "--help"], capture_output=True, text=True, env=environment, timeout=180)
    assert result.returncode == 0, result.stderr
    assert shows_all_of(result.stdout, COMMANDS["serve"])


def test_every_command_is_said_in_whole_sentences() -> None:
    output = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["--help"]).output
    for name, command in COMMANDS.items():
        assert name in output.split()
        assert without_spaces(command.help.partition("\n\n")[0]) in without_spaces(output)
    assert "..." not in output.partition("Commands:")[2]


def test_what_a_command_does_not_need_is_not_imported() -> None:
    """Of a client's commands neither torch nor transformers, which take seconds."""
    code = (
        "import sys; from ts_parallel.cli.main import app; from typer.testing import CliRunner;"
        "assert all(CliRunner().invoke(app, [name, '--help']).exit_code == 0 for name in ('complete', 'bench'));"
        "sys.exit(str({'torch', 'transformers'} & set(sys.modules)) if 'torch' in sys.modules else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
