"""Checkpoints as people store them answer on two ranks as the plain ones; what is refused is so by one line.

`python tests/checkpoint_table.py` runs all kinds; `checkpoint/folders/` and `checkpoint/formats/` hold their rules.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_table import EQUAL, SHAPES
from stored_checkpoints import STORED_REFUSED

SCRIPT = Path(__file__).parents[1] / "checkpoint_table.py"
KINDS = (
    *("names of TRL, beside a value head", "names around a text model", "a trainer's folder, one checkpoint"),
    *("torch before 1.6", "Meta's consolidated.00.pth, 01", "torchtitan's names", "tied, head of other values"),
    "LoRA, as a model of images has it",
)
REFUSED = ("several checkpoints", "git-lfs pointer", "names of PEFT, not merged", "LoRA, PiSSA")


@pytest.mark.ranks
def test_stored_checkpoints_answer_as_the_plain_ones_or_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "outcomes.json"
    command = [sys.executable, str(SCRIPT), "--json", str(file), *KINDS, *REFUSED]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    outcomes = json.loads(file.read_text())
    assert {kind: outcomes[kind] for kind in KINDS} == dict.fromkeys(KINDS, dict.fromkeys(SHAPES, EQUAL))
    for kind in REFUSED:
        for line in outcomes[kind].values():
            assert STORED_REFUSED[kind][1] in line and "\n" not in line, kind
