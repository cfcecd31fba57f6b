"""With the kernels a token's logits are the same bits whoever shares its step, however its prompt was cut, and wherever
its keys and values come from; at each parallel shape, for each kind of weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, save_random_model
from places import RANKS
from programs import keep_for_ranks

from ts_parallel.native import HAS_KERNELS, kernels_for

pytestmark = pytest.mark.skipif(not HAS_KERNELS, reason="torch's own functions may round by who shares a step")
SCRIPT = RANKS / "invariance.py"
DTYPES = ["bfloat16", *(["float16"] if kernels_for(torch.float16) else [])]
NINE_HEADS = {"hidden_size": 72, "head_dim": 8, "num_attention_heads": 9, "num_key_value_heads": 3}
"""Of two ranks one has twice as many."""
KINDS = [
    json.dumps({"dtype": dtype} | own)
    for dtype in DTYPES
    for own in ({}, {"quantization": "int8"}, {"quantization": "int4"})
]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("family", "tp", "pp", "sizes"),
    [("llama", 1, 1, {}), ("gemma2", 1, 1, {}), ("llama", 2, 1, {}), ("llama", 1, 2, {}), ("llama", 2, 1, NINE_HEADS)],
)
def test_logits_are_the_same_bits_in_any_company(
    family: str, tp: int, pp: int, sizes: dict[str, int], tmp_path: Path
) -> None:
    folder = tmp_path / family
    save_random_model(folder, FAMILIES[family](**sizes), dtype=torch.bfloat16)
    for dtype in DTYPES:
        keep_for_ranks(folder, {"dtype": dtype, "tensor_parallel_size": tp, "pipeline_parallel_size": pp})
    command = [sys.executable]
    if tp * pp > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(tp * pp)]
    report = tmp_path / "report.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    command += [str(SCRIPT), str(report), f"{tp}x{pp}", str(folder), *KINDS]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(report.read_text())
    assert list(found) == KINDS
    for kind, answers in found.items():
        for company, numbers in answers.items():
            assert numbers == answers["alone"], (kind, company)
    assert len({json.dumps(answers["alone"]) for answers in found.values()}) == len(KINDS)
