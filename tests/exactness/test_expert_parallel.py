"""Greedy float32 tokens are those of transformers' `generate` where each rank keeps some of the experts whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exact_answers import keep_programs, parallel_answers, plain_answers, write_prompts
from families import TINY_FAMILIES, save_random_model

LENGTHS = (1, 7, 22, 40)
MAX_TOKENS = 24
# One by one in the checkpoint; more of them on one rank, and shared ones beside; groups of experts; a bias, and no line
# in the family's own plan; rows of another order.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {"num_experts": 5},
    "deepseek_v3": {"first_k_dense_replace": 0},
    "gpt_oss": {},
    "aria_text": {},
}


@pytest.mark.ranks
def test_tokens_of_ranks_with_whole_experts_are_the_plain_models(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = {}
    for name, changes in FAMILIES.items():
        config = TINY_FAMILIES[name](num_hidden_layers=1, **changes)
        save_random_model(tmp_path / name, config)
        write_prompts(tmp_path / name, config.vocab_size, LENGTHS, MAX_TOKENS, enable_expert_parallel=True)
        keep_programs(tmp_path / name, 2, 1)
        expected[name] = plain_answers(tmp_path / name)
    torch.set_num_threads(before)
    found = parallel_answers([tmp_path / name for name in FAMILIES], [(2, 1)], tmp_path / "report.json")
    for name, answers in expected.items():
        assert len(set(map(tuple, answers))) == len(LENGTHS), f"{name} answers several prompts alike: a weak test"
        assert found[2, 1][name] == answers, name
