"""A short run of benchmarks/parts/under_load.py: many streams, clients that leave, wrong bodies, scarce KV memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import BENCHMARKS

SCRIPT = BENCHMARKS / "parts" / "under_load.py"


@pytest.mark.torchserve
def test_load_gets_right_answers_and_leaves_nothing_behind(tmp_path: Path) -> None:
    report_file = tmp_path / "report.json"
    command = [
        sys.executable,
        str(SCRIPT),
        "--streams",
        "40",
        "--seconds",
        "12",
        "--prompts",
        "24",
        "--json",
        str(report_file),
    ]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert report_file.is_file(), result.stderr[-3000:]
    report = json.loads(report_file.read_text())
    assert report["faults"] == []
    assert result.returncode == 0
    requests, ended = report["requests"], report["ended"]
    assert min(requests[kind] for kind in ("read to the end", "left", "bad body")) > 0
    assert ended["length"] >= requests["read to the end"]
    assert ended["abort"] > 0  # some of those that left were noticed before their end
    assert report["preemptions"] > 0
