"""`examples/gpu_check --dry-run` does on the CPU, at toy size, all that it does on a GPU; what fails is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

pytest.importorskip("triton", reason="Triton is not installed")

PROGRAM = ROOT / "examples" / "gpu_check" / "gpu_check.py"
SECTIONS = ["machine", "attention", "sampling", "families", "llama_8b", "qwen3_0_6b", "mixtral"]
PATHS = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
# transformers', which may refuse to run where there is no GPU.
OF_OTHERS = "by transformers, generate_batch"


def run(out: Path, *arguments: str, **environment: str) -> tuple[int, list[dict[str, Any]], str]:
    """Its exit code, what each check has found, and the page."""
    command = [sys.executable, str(PROGRAM), "--dry-run", "--out", str(out), *arguments]
    own = {**os.environ, "PYTHONPATH": PATHS, **environment}
    found = subprocess.run(command, env=own, capture_output=True, text=True, timeout=900)
    assert (out / "gpu_check.json").exists(), found.stderr[-4000:]
    return found.returncode, json.loads((out / "gpu_check.json").read_text()), (out / "gpu_check.md").read_text()


def test_dry_run_finds_nothing_wrong(tmp_path: Path) -> None:
    _, checks, page = run(tmp_path)
    assert list(dict.fromkeys(check["section"] for check in checks)) == SECTIONS
    assert [check for check in checks if check["ok"] is not True and OF_OTHERS not in check["check"]] == []
    for name in ("largest_error", "tokens_per_s", "share_of_copy", "output_tokens_per_s", "furthest"):
        assert f" {name} |" in page
    assert all(f"\n## {section}\n" in page for section in SECTIONS)


def test_section_that_breaks_is_named_and_the_next_goes_on(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'sampling' in sys.argv[-4:] and '--section' in sys.argv: os._exit(9)\n"
    )
    paths = f"{tmp_path}{os.pathsep}{PATHS}"
    code, checks, page = run(tmp_path, "--sections", "sampling", "machine", PYTHONPATH=paths)
    assert code == 1
    assert [(check["section"], check["ok"]) for check in checks][-1] == ("sampling", False)
    assert checks[-1]["found"]["why"] == "its process ended with 9"
    assert "- **sampling: the section**: its process ended with 9" in page
    assert {check["ok"] for check in checks[:-1]} == {True}


def test_check_that_fails_is_told_with_its_trace_and_the_others_go_on(tmp_path: Path) -> None:
    """Without Triton there is no kernel to check, and torch's own are measured all the same."""
    (tmp_path / "triton.py").write_text("raise ImportError('no Triton here')\n")
    paths = f"{tmp_path}{os.pathsep}{PATHS}"
    _, checks, page = run(tmp_path, "--sections", "machine", "attention", PYTHONPATH=paths)
    outcomes = {section: {check["ok"] for check in checks if check["section"] == section} for section in SECTIONS[:2]}
    assert True in outcomes["machine"] and outcomes["attention"] == {False}
    assert "no Triton here" in page and "```text" in page
