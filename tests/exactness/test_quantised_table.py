"""Quantised checkpoints on two ranks answer as the plain ones that they stand for: one of each way of being stored.

`python tests/checkpoint_table.py` runs all kinds; `checkpoint/codes/` holds each one's numbers, and each refusal.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_table import EQUAL, SHAPES

SCRIPT = Path(__file__).parents[1] / "checkpoint_table.py"
KINDS = ("FP8, blocks, experts", "GPTQ, 4 bits, act-order", "MXFP4 (gpt-oss)", "GGUF Q4_0", "NVFP4 (ModelOpt)")


@pytest.mark.ranks
def test_quantised_checkpoints_answer_as_the_plain_ones_or_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "outcomes.json"
    command = [sys.executable, str(SCRIPT), "--json", str(file), *KINDS]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    *equal, refused = json.loads(file.read_text()).values()
    assert equal == [dict.fromkeys(SHAPES, EQUAL)] * (len(KINDS) - 1)
    for line in refused.values():
        assert line.startswith("MODEL/hf_quant_config.json says quantization: quant_algo 'NVFP4'"), line
