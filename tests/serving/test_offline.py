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
from families import FAMILIES, random_model, save_random_model
from places import ROOT
from small_service import checkpoint_with
from small_tokenizers import legacy_sentencepiece
from transformers import AutoModelForCausalLM, AutoTokenizer

from ts_parallel.config import parse_config
from ts_parallel.engine.request import GenerationParams, Request
from ts_parallel.errors import EngineError, RequestError, StartupError
from ts_parallel.native import HAS_KERNELS
from ts_parallel.serving import offline
from ts_parallel.serving.offline import open_model
from ts_parallel.step_plan import SamplingParams

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


def test_answer_keeps_its_first_space(tmp_path: Path) -> None:
    tokenizer = legacy_sentencepiece()
    folder = checkpoint_with(tmp_path / "demo", tokenizer)
    (token_id,) = tokenizer.convert_tokens_to_ids(["▁token"])
    with open_model(folder, dtype="float32", device="cpu", kv_cache_memory="64MiB") as model:
        (answer,) = model.generate(["the"], GenerationParams(1, SamplingParams(logit_bias=((token_id, 100.0),))))
    assert (answer.text, answer.token_ids) == (" token", (token_id,))


def test_tokens_that_the_model_has_not_are_refused_and_it_answers_on(tmp_path: Path) -> None:
    """Over a weight that embedding and head share, which kernels read; the tokenizer knows a token more, and so does
    what it says of ends."""
    folder = tmp_path / "model"
    save_random_model(folder, FAMILIES["llama"](vocab_size=2048, tie_word_embeddings=True), dtype=torch.bfloat16)
    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO_MODEL, local_files_only=True)
    tokenizer.add_tokens(["<|extra|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 2048]}')
    with open_model(folder, device="cpu", kv_cache_memory="4MiB") as model:
        for ids in ([10**7], [-1], [5, 2048], [True], [5.0]):
            with pytest.raises(RequestError, match=f"position {len(ids) - 1} of prompt is "):
                model.generate([[5, 6], ids], GenerationParams(4))
        with pytest.raises(RequestError, match=r"token id 2048 \('<\|extra\|>'\) at .* vocabulary of 2048"):
            model.generate(["a <|extra|>"], GenerationParams(4))
        for bias in (((2048, 1.0),), ((-1, 1.0),)):
            with pytest.raises(RequestError, match="logit_bias"):
                model.generate(["a"], GenerationParams(4, SamplingParams(logit_bias=bias)))
        with pytest.raises(RequestError, match="stop_token_ids"):
            model.generate(["a"], GenerationParams(4, stop_token_ids=(2048,), min_tokens=2))
        (answer,) = model.generate([torch.tensor([5, 6])], GenerationParams(4, min_tokens=4))  # type: ignore[list-item]
        assert len(answer.token_ids) == 4


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        # torch's own functions may give others' tokens by who shares a step with them.
        pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not HAS_KERNELS, reason="there are no kernels")),
    ],
)
def test_prompt_that_makes_nan_fails_alone_and_leaves_nothing_behind(tmp_path: Path, dtype: torch.dtype) -> None:
    """With keys and values of NaN in blocks that others get next, beside requests of other lengths."""
    folder = tmp_path / "model"
    broken = random_model(FAMILIES["llama"](vocab_size=2048, tie_word_embeddings=False), 0).to(dtype)
    with torch.no_grad():
        broken.get_input_embeddings().weight[5] = torch.inf  # which the first norm makes NaN
    broken.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_MODEL, local_files_only=True).save_pretrained(folder)
    params = GenerationParams(12, SamplingParams(0.9, 0.8, 3), ignore_eos=True)
    prompts: list[list[int]] = [[7, 8, 9], [5, *range(40, 80)], [10], list(range(11, 48))]
    name = str(dtype).removeprefix("torch.")
    with open_model(folder, device="cpu", dtype=name, kv_cache_memory="4MiB", max_model_len=64) as model:
        alone = [model.generate([prompt], params)[0].token_ids for prompt in prompts if 5 not in prompt]
        for _ in range(3):
            with pytest.raises(EngineError, match=r"request 0 of 1, after 0 tokens: .* NaN"):
                model.generate([prompts[1]], params)
            requests = [model._request(prompt, params) for prompt in prompts]  # type: ignore[attr-defined]
            with pytest.raises(EngineError, match=r"request 1 of 4"):
                model._engine.generate(requests)  # type: ignore[attr-defined]
            assert [tuple(own.output_ids) for own in requests if own.error is None] == alone
            assert [generation.token_ids for generation in model.generate([prompts[0], *prompts[2:]], params)] == alone


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
