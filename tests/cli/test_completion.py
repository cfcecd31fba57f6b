"""Tab completes commands, options and values in a shell that has loaded what `--show-completion` prints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ts_parallel.cli.main import app

SCRIPTS = str(Path(sys.executable).parent)
PRESS_TAB = """
eval "$(ts-parallel --show-completion)"
COMP_WORDS=(ts-parallel serve --max-num)
COMP_CWORD=2
$(complete -p ts-parallel | sed 's/.*-F \\([^ ]*\\) .*/\\1/') ts-parallel
printf '%s\\n' "${COMPREPLY[@]}"
"""


def completions(line: str) -> list[str]:
    words = f"ts-parallel {line}"
    environment = {
        "_TS_PARALLEL_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(line.count(" ") + 1),
    }
    return CliRunner(env=environment).invoke(app, [], prog_name="ts-parallel").output.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ser", ["serve"]),
        ("serve --quant", ["--quantization"]),
        ("archive --quantization int", ["int8", "int4"]),
        ("plan --dtype f", ["float32", "float16"]),
    ],
)
def test_commands_options_and_values_are_completed(line: str, expected: list[str]) -> None:
    assert completions(line) == expected


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_tab_asks_the_command_once_a_shell_has_loaded_what_it_shows(tmp_path: Path) -> None:
    path = SCRIPTS + os.pathsep + os.environ["PATH"]
    result = subprocess.run(
        ["bash", "--norc", "-c", PRESS_TAB],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HOME": str(tmp_path), "PATH": path},
    )
    assert result.stdout.split() == ["--max-num-seqs", "--max-num-batched-tokens", "--max-num-waiting"], result.stderr
