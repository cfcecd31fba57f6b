"""A file that stands for another one, or is empty, is said to be so: weights, configuration and tokenizer alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ts_parallel.checkpoint.index import read_index
from ts_parallel.errors import CheckpointError
from ts_parallel.partition.model.model_config import read_model_config
from ts_parallel.serving.text.model_files import read_tokenizer

POINTER = """version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 4976698672
"""
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model-00001-of-00001.safetensors", "model.safetensors.index.json")


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, r"is a git-lfs pointer to a file of 4,976,698,672 bytes, not the file itself: run `git lfs pull`"),
        ("", r"is empty \(0 bytes\): it was not written or copied to its end"),
    ],
)
def test_weights_that_are_not_there_are_said_not_to_be(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=f"^{tmp_path / name} {message}"):
        read_index(tmp_path)


def test_one_shard_that_is_a_pointer_is_named(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").write_text(POINTER)
    files = {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is a git-lfs pointer"):
        read_index(tmp_path)


@pytest.mark.parametrize(("content", "message"), [(POINTER, "is a git-lfs pointer"), ("", "is empty")])
def test_configuration_and_tokenizer_that_are_not_there_are_said_not_to_be(
    tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=f"config.json {message}"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        (tmp_path / name).write_text(content)
        with pytest.raises(CheckpointError, match=f"{name} {message}"):
            read_tokenizer(tmp_path)
        (tmp_path / name).unlink()


def test_small_text_of_another_kind_is_no_pointer(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version 2 of nothing")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        read_index(tmp_path)
