"""The engine in a plain program: alone, and as ranks of torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from ts_parallel.config import parse_config
from ts_parallel.engine.request import GenerationParams, Request
from ts_parallel.errors import RequestError, StartupError
from ts_parallel.serving import offline
from ts_parallel.serving.offline import open_model

SCRIPT, DEMO_MODEL = ROOT / "examples" / "offline.py", ROOT / "examples" / "demo_model"
PROMPTS = ["Return a list of", "Open the file"]


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """transformers' own greedy answers."""
    model: Any = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO_MODEL, local_files_only=True)
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=24, pad_token_id=1)
        texts.append(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
    return texts


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("launcher", "options"),
    [
        ([], []),
        (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], []),
        (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], ["--pipeline-parallel-size", "2"]),
    ],
)
def test_example_answers_like_the_plain_model(
    launcher: list[str], options: list[str], expected: list[str], tmp_path: Path
) -> None:
    command = [sys.executable, *launcher, str(SCRIPT), *PROMPTS, "--dtype", "float32", "--max-tokens", "24", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    result = subprocess.run([*command, *options], capture_output=True, text=True, timeout=180, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout) == expected


def test_one_model_answers_again_and_again(expected: list[str]) -> None:
    with open_model(DEMO_MODEL, dtype="float32", device="cpu", kv_cache_memory="64MiB") as model:
        for _ in range(2):
            answers = model.generate(PROMPTS, GenerationParams(24))
            assert [answer.text for answer in answers] == expected
        ids = model.generate([[5, 6, 7]], GenerationParams(4, ignore_eos=True))[0]
        assert (len(ids.token_ids), ids.finish_reason) == (4, "length")
        with pytest.raises(RequestError, match="empty"):
            model.generate([""], GenerationParams(4))


def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(StartupError), open_model(tmp_path):
        pass


def test_ranks_that_follow_hear_of_the_leader_between_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or they would take a program that thinks for two minutes for a dead one."""
    monkeypatch.setattr(offline, "SECONDS_BETWEEN_SIGNS_OF_LIFE", 0.01)
    signs: list[bool] = []
    is_generating = threading.Event()
    enough = threading.Event()

    class Engine:
        def sign_of_life(self) -> None:
            signs.append(is_generating.is_set())
            if len(signs) == 3:
                enough.set()

        def generate(self, requests: list[Request]) -> None:
            is_generating.set()
            time.sleep(0.1)
            for request in requests:
                request.output_ids.append(next(iter(request.eos_ids)))
            is_generating.clear()

    engine: Any = Engine()
    config = parse_config({"model_path": str(DEMO_MODEL), "tensor_parallel_size": 2})
    model = offline._Leader(engine, config, DEMO_MODEL)
    model.generate(["a"], GenerationParams(4))
    assert enough.wait(10)
    model.close()
    count = len(signs)
    time.sleep(0.05)
    assert len(signs) == count and True not in signs
