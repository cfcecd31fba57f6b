"""Ranks that cannot have as many heads each answer as the plain model: greedy float32 tokens, logits of the kernels.

Prompts share their beginnings, memory is short, and each is asked twice: so there are prefix hits and preemption.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_answers import plain_answers
from families import FAMILIES, save_random_model
from places import RANKS
from programs import keep_for_ranks
from ranks.uneven_heads import PREFILLED
from transformers import AutoModelForCausalLM

SCRIPT = RANKS / "uneven_heads.py"
MAX_TOKENS = 20
MOST_TIMES_AS_WRONG = 1.2
NINE: dict[
    str, Any
] = {  # as many as SmolLM2-135M; and an MLP of which one half is even, as kernels want it, and one is not
    **{"hidden_size": 72, "head_dim": 8, "num_attention_heads": 9, "num_key_value_heads": 3},
    **{"intermediate_size": 131, "vocab_size": 97, "num_hidden_layers": 2},
}
FOUR = {"num_hidden_layers": 2, "vocab_size": 97}
MODELS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "llama": NINE,
        "qwen2": NINE,
        "qwen3": NINE,  # norms over each head
        "gemma2": {**NINE, "query_pre_attn_scalar": 8},  # windows and a soft cap
        "mixtral": {**NINE, "intermediate_size": 136},
        "gpt2": {**FOUR, "hidden_size": 72, "num_attention_heads": 9},  # one projection, as many key/value heads
    },
    3: {"llama": {**FOUR, "intermediate_size": 200}, "phi3": FOUR, "gpt_neox": FOUR, "mixtral": FOUR},
    # as many as Qwen2-0.5B: two ranks share a key/value head, and one has more of the heads that read it
    4: {"qwen2": {**FOUR, "hidden_size": 112, "num_attention_heads": 14, "num_key_value_heads": 2}},
}


def prompts() -> list[list[int]]:
    """Of five, three begin alike, and two of those more so."""
    generator = torch.Generator().manual_seed(0)
    start, rest, *ends = (
        torch.randint(97, (length,), generator=generator).tolist() for length in (13, 9, 3, 11, 6, 30, 1)
    )
    return [start + rest + ends[0], start + rest + ends[1], start + ends[2], ends[3], ends[4]]


@torch.inference_mode()
def plain_logits(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    logits: torch.Tensor = model(torch.tensor([max(prompts(), key=len)]), use_cache=False).logits[0]
    return logits.float()[PREFILLED - 1 :]


@pytest.mark.ranks
@pytest.mark.parametrize("size", MODELS)
def test_ranks_with_more_and_fewer_heads_answer_as_the_plain_model(size: int, tmp_path: Path) -> None:
    for name, changes in MODELS[size].items():
        save_random_model(tmp_path / name, FAMILIES[name](**changes), dtype=torch.bfloat16)
        task = {"prompts": prompts(), "max_tokens": MAX_TOKENS}
        (tmp_path / name / "task.json").write_text(json.dumps(task))
        for dtype in ("float32", "bfloat16"):
            keep_for_ranks(tmp_path / name, {"dtype": dtype, "tensor_parallel_size": size})
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command += [str(SCRIPT), str(report), str(size), *(str(tmp_path / name) for name in MODELS[size])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    for name, found in json.loads(report.read_text()).items():
        expected = plain_answers(tmp_path / name)
        assert len(set(map(tuple, expected))) > 3, f"{name} answers all prompts alike: a weak test"
        own = found["float32"]["answer"]
        assert own["turns"] == [expected, expected], name
        assert own["hits"] and own["preemptions"], name
        for dtype in found:
            assert len(set(found[dtype]["num_blocks"])) == 1, (name, dtype)
        exact, theirs = (plain_logits(tmp_path / name, dtype) for dtype in (torch.float32, torch.bfloat16))
        ours = torch.tensor(found["bfloat16"]["answer"])
        errors = [(logits - exact).pow(2).mean().sqrt().item() for logits in (ours, theirs)]
        assert errors[0] <= MOST_TIMES_AS_WRONG * errors[1], (name, errors)
