"""The table of families in ts_parallel/partition/README.md is true: which answer as transformers does, and why not.

All of them go through two ranks in one run of `family_table.py`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from families import TINY_FAMILIES
from family_table import EQUAL, SHAPES

SCRIPT = Path(__file__).parents[1] / "family_table.py"
OWN_ATTENTION = (
    "computes with the attention mask itself at `.*` .*only attention that goes through transformers' interface"
)
NO_INTERFACE = "its attention does not go through transformers' interface"
NO_CALLS = "sends 0 attention calls through transformers' interface, 2 layers were expected"
OTHER_LAYERS = r"has layers of type \[.*\]; only attention can be paged"

REFUSED = {
    **dict.fromkeys(("bloom", "codegen", "doge", "gpt_neox_japanese", "mpt", "xglm"), OWN_ATTENTION),
    **dict.fromkeys(("falcon", "gpt_neo", "gptj"), NO_INTERFACE),
    **dict.fromkeys(("openai-gpt", "rwkv"), NO_CALLS),
    **dict.fromkeys(
        (
            *("bamba", "deepseek_v32", "deepseek_v4", "falcon_h1", "jamba", "lfm2", "llama4_text", "mamba", "mamba2"),
            *("minimax", "nemotron_h", "qwen3_next", "recurrent_gemma"),
        ),
        OTHER_LAYERS,
    ),
    "jetmoe": r"cannot run without data at `expert_size = expert_size\.tolist\(\)` .*: it reads what a tensor holds",
    **dict.fromkeys(
        ("llama (rope longrope)", "gemma3_text (rope longrope)"),
        "'longrope' changes with the longest sequence of a batch beyond 32 tokens: set max_model_len",
    ),
}
"""Family → what both shapes' reasons say."""


@pytest.mark.ranks
def test_families_answer_exactly_as_transformers_does_or_are_refused_with_their_reason(tmp_path: Path) -> None:
    file = tmp_path / "outcomes.json"
    command = [sys.executable, str(SCRIPT), "--json", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    outcomes = json.loads(file.read_text())
    assert outcomes.keys() == TINY_FAMILIES.keys()
    others = {family: own for family, own in outcomes.items() if own != dict.fromkeys(SHAPES, EQUAL)}
    assert others.keys() == REFUSED.keys(), {family: others.get(family) for family in others.keys() ^ REFUSED.keys()}
    for family, own in others.items():
        for reason in own.values():
            assert re.search(REFUSED[family], reason), (family, reason)
            assert "\n" not in reason
    exact = outcomes.keys() - others.keys()
    assert len({TINY_FAMILIES[family]().model_type for family in exact}) >= 60
