"""Greedy float32 tokens are those of transformers' `generate`, for every parallel shape: eight prompts at once."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, save_random_model
from transformers import AutoModelForCausalLM

from ts_parallel.checkpoint.index import read_index
from ts_parallel.partition import prepared
from ts_parallel.partition.build import make_programs
from ts_parallel.partition.program import PipelinePlace, ProgramRequest

DEMO_MODEL = Path(__file__).parents[2] / "examples" / "demo_model"
RANKS = Path(__file__).parents[1] / "ranks" / "generate.py"
NAMES = ("llama", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox", "opt", "mixtral", "demo")
LENGTHS = (1, 2, 5, 11, 17, 30, 52, 80)
MAX_TOKENS = 64


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family → a folder with its checkpoint and, in `task.json`, the prompts."""
    root = tmp_path_factory.mktemp("models")
    for name in NAMES:
        if name == "demo":
            (root / name).mkdir()
            for file in DEMO_MODEL.iterdir():
                (root / name / file.name).symlink_to(file)
        else:
            save_random_model(root / name, FAMILIES[name]())
        vocabulary = json.loads((root / name / "config.json").read_text())["vocab_size"]
        generator = torch.Generator().manual_seed(0)
        prompts = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in LENGTHS]
        (root / name / "task.json").write_text(json.dumps({"prompts": prompts, "max_tokens": MAX_TOKENS}))
    return {name: root / name for name in NAMES}


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, list[list[int]]]:
    """transformers' own answers, each prompt alone, none ended before its 64 tokens."""
    return {name: plain_answers(folder) for name, folder in models.items()}


def plain_answers(folder: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    answers = []
    for prompt in json.loads((folder / "task.json").read_text())["prompts"]:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_TOKENS, pad_token_id=0
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


@pytest.mark.ranks
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (2, 2)])
def test_tokens_of_every_parallel_shape_are_the_plain_models(
    models: dict[str, Path], expected: dict[str, list[list[int]]], tp: int, pp: int, tmp_path: Path
) -> None:
    for folder in models.values():  # here, where what makes them is imported already
        request, index = ProgramRequest(folder, "float32", 0, tp, PipelinePlace(0, pp)), read_index(folder)
        cache = prepared._cache_folder()
        assert cache is not None
        programs = {own: pickle.dumps(program) for own, program in make_programs(request, index).items()}
        prepared._keep(cache / prepared._digest(request, index), programs)
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(tp * pp)]
    command += [str(RANKS), str(report), str(tp), str(pp), *map(str, models.values())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    answers = json.loads(report.read_text())
    for name in models:
        assert len(set(map(tuple, expected[name]))) > 4, f"{name} answers all prompts alike: a weak test"
        assert answers[name] == expected[name], name
