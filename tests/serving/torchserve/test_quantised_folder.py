"""A real TorchServe with two ranks of a GGUF folder, whose three key/value heads they cannot share evenly: its greedy
answers are those of the model that transformers computes of the same file."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import tiny
from gguf import GGMLQuantizationType
from gguf_files import GgufKind, write_gguf
from http_client import events, post
from places import DEMO_MODEL
from transformers import AutoModelForCausalLM, AutoTokenizer

from ts_parallel.checkpoint.gguf.header import read_header
from ts_parallel.checkpoint.gguf.settings import config_of
from ts_parallel.cli.server.archive import handler_config
from ts_parallel.cli.server.serve import running
from ts_parallel.cli.server.torchserve import TorchServe, free_ports

pytestmark = pytest.mark.torchserve

MAX_TOKENS = 24
PROMPTS = ("Return a list of", "def main(", "The")
HEADS = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Random weights in blocks of Q4_0, with the demo model's tokenizer; and what transformers reads of them."""
    root = tmp_path_factory.mktemp("gguf")
    vocabulary = json.loads((DEMO_MODEL / "config.json").read_text())["vocab_size"]
    config = tiny("llama", **HEADS, vocab_size=vocabulary, tie_word_embeddings=False)
    write_gguf(root / "own", root / "plain", GgufKind(GGMLQuantizationType.Q4_0, config=config))
    described, _ = config_of(read_header(root / "own" / "model.gguf"))
    (root / "own" / "config.json").write_text(json.dumps(described))
    for folder in (root / "own", root / "plain"):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO_MODEL / name, folder)
    return root / "own", root / "plain"


@pytest.fixture(scope="module")
def server(folders: tuple[Path, Path]) -> Iterator[TorchServe]:
    folder, _ = folders
    settings = {"dtype": "float32", "max_model_len": 128, "kv_cache_memory": "16MiB"}
    config = handler_config(folder, "cpu", tensor_parallel_size=2, **settings)
    port, metrics_port = free_ports(2)
    with running(config, folder, "demo", "127.0.0.1", port, False, threading.Event(), metrics_port) as server:
        yield server


def test_answers_are_those_of_the_model_that_transformers_computes(
    server: TorchServe, folders: tuple[Path, Path]
) -> None:
    _, plain = folders
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(plain, local_files_only=True)
    answers = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_TOKENS, pad_token_id=0)
        expected = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
        status, text = post(f"{server.url}/1.0/v1/completions", body)
        assert status == 200, text
        pieces = [event["choices"][0]["text"] for event in events(text) if event != "[DONE]" and event["choices"]]
        assert "".join(pieces) == expected
        answers.append(expected)
    assert len(set(answers)) == len(PROMPTS), "all prompts are answered alike: a weak test"
