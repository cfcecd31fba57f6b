"""Greedy float32 tokens are those of transformers' `generate`, for every parallel shape: eight prompts at once.

The families are those of which each has a mechanism of its own; `test_family_table.py` has the breadth.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from exact_answers import Answers, keep_programs, parallel_answers, plain_answers, write_prompts
from families import FAMILIES, save_random_model
from places import DEMO_MODEL

LENGTHS = (1, 2, 5, 11, 17, 30, 52, 80)
MAX_TOKENS = 64
# Grouped heads and an uneven vocabulary; windows and a soft cap; one fused projection; experts; a trained model.
NAMES = ("llama", "gemma2", "gpt2", "mixtral", "demo")
Shapes = list[tuple[int, int]]
RUNS: list[tuple[Shapes, tuple[str, ...]]] = [
    ([(1, 1)], NAMES),
    ([(2, 1), (1, 2)], ("llama", "gpt2", "demo")),
    ([(4, 1), (1, 4), (2, 2)], ("llama", "gemma2", "mixtral")),
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """In models as small as these, threads do little but wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family → a folder with its checkpoint and prompts."""
    root = tmp_path_factory.mktemp("models")
    for name in NAMES:
        if name == "demo":
            (root / name).mkdir()
            for file in DEMO_MODEL.iterdir():
                (root / name / file.name).symlink_to(file)
        else:
            save_random_model(root / name, FAMILIES[name]())
        vocabulary = json.loads((root / name / "config.json").read_text())["vocab_size"]
        write_prompts(root / name, vocabulary, LENGTHS, MAX_TOKENS)
    return {name: root / name for name in NAMES}


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, Answers]:
    return {name: plain_answers(folder) for name, folder in models.items()}


@pytest.mark.ranks
@pytest.mark.parametrize(("shapes", "names"), RUNS, ids=["1 rank", "2 ranks", "4 ranks"])
def test_tokens_of_every_parallel_shape_are_the_plain_models(
    models: dict[str, Path], expected: dict[str, Answers], shapes: Shapes, names: tuple[str, ...], tmp_path: Path
) -> None:
    """Shapes of as many ranks are one run, which imports and starts once."""
    for name in names:
        for tp, pp in shapes:
            keep_programs(models[name], tp, pp)
    found = parallel_answers([models[name] for name in names], shapes, tmp_path / "report.json")
    for name in names:
        assert len(set(map(tuple, expected[name]))) > 4, f"{name} answers all prompts alike: a weak test"
        for shape in shapes:
            assert found[shape][name] == expected[name], (name, shape)
