"""Greedy tokens of a checkpoint for a few prompts: transformers' own, and those of ranks that share the model.

The prompts lie in the checkpoint's folder as `task.json`, the ranks' programs in a folder beside it.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from places import RANKS
from transformers import AutoModelForCausalLM, PreTrainedModel

from ts_parallel.checkpoint.index import read_index
from ts_parallel.config import parse_config
from ts_parallel.partition import prepared
from ts_parallel.partition.build import make_programs
from ts_parallel.partition.program import PipelinePlace
from ts_parallel.serving.causal_lm import program_request

RANKS = RANKS / "generate.py"

Answers = list[list[int]]


def write_prompts(folder: Path, vocabulary: int, lengths: Iterable[int], max_tokens: int, **settings: Any) -> None:
    """Random prompts of these lengths, all to be answered with `max_tokens` tokens; `settings` are further keys of the
    `handler:` section of the ranks that answer them."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]
    task = {"prompts": prompts, "max_tokens": max_tokens, "settings": settings}
    (folder / "task.json").write_text(json.dumps(task))


def settings_of(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((folder / "task.json").read_text())["settings"]
    return settings


def plain_answers(folder: Path) -> Answers:
    """transformers' own, each prompt alone, none ended before its last token."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    task = json.loads((folder / "task.json").read_text())
    answers = []
    for prompt in task["prompts"]:
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": task["max_tokens"], "pad_token_id": 0}
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def keep_programs(folder: Path, tp: int, pp: int) -> None:
    """Make the ranks' programs here, where what makes them is imported already.

    Raises:
        StartupError: the model is refused.
    """
    section = {"model_path": str(folder), "dtype": "float32", "tensor_parallel_size": tp}
    config = parse_config({**section, **settings_of(folder)})
    request, index = program_request(config, folder, 0, PipelinePlace(0, pp)), read_index(folder)
    programs = {own: pickle.dumps(program) for own, program in make_programs(request, index).items()}
    with mock.patch.dict(os.environ, {prepared.CACHE_VARIABLE: f"{folder}-programs"}):
        cache, _ = prepared.find_cache()
    assert cache is not None
    prepared._keep(cache / prepared._digest(request, index), programs)


def parallel_answers(
    folders: Sequence[Path], shapes: Sequence[tuple[int, int]], report: Path
) -> dict[tuple[int, int], dict[str, Answers | str]]:
    """Shape (tp, pp) → name of a folder → what its ranks have answered, or the line that refuses it. All shapes have as
    many ranks; `report` is a file to be written."""
    spelled = [f"{tp}x{pp}" for tp, pp in shapes]
    (num_ranks,) = {tp * pp for tp, pp in shapes}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command += [str(RANKS), str(report), *spelled, "--", *map(str, folders)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(report.parent)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    answers = json.loads(report.read_text())
    return {shape: answers[name] for shape, name in zip(shapes, spelled, strict=True)}


def judge(answers: Answers | str, plain: Answers, equal: str, wrong: str) -> str:
    """`equal` or `wrong`; why there are no answers, where they are a text; or that `plain` ones would prove little."""
    if isinstance(answers, str):
        return answers
    if len(set(map(tuple, plain))) < len(plain):
        return "transformers answers several prompts alike: a weak test"
    return equal if answers == plain else wrong
