"""Which files are a folder's weights, where nobody has named them as transformers does; several are never guessed."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ts_parallel.checkpoint.index import read_index
from ts_parallel.errors import CheckpointError

A, B = {"a": torch.ones(2)}, {"b": torch.zeros(3)}


def save(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    (save_file if file.suffix == ".safetensors" else torch.save)(tensors, file)


@pytest.mark.parametrize(
    "names",
    [
        *(("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),),
        *(("model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"),),
        *(("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"),),
        *(("model-00001-of-00002.fp16.safetensors", "model-00002-of-00002.fp16.safetensors"),),
        *(("hf_model_0001_0.pt", "hf_model_0002_0.pt"),),
        *(("ft-model-00001-of-00002.safetensors", "ft-model-00002-of-00002.safetensors"),),
    ],
)
def test_shards_without_an_index_are_read_if_none_is_missing(
    tmp_path: Path, names: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / names[1], B)
    with pytest.raises(CheckpointError, match=r"number [012] of 2 is missing"):
        read_index(tmp_path)
    save(tmp_path / names[0], A)
    save(tmp_path / "adapter_model.safetensors", {"c": torch.ones(1)})
    torch.save({}, tmp_path / "training_args.bin")
    with caplog.at_level(logging.INFO):
        assert read_index(tmp_path).keys() == {"a", "b"}
    assert f"its weights are 2 shards without an index ({names[0]}, …)" in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        "model.fp16.safetensors",
        "pytorch_model.fp16.bin",
        "my-finetune.safetensors",
        "last.ckpt",
        "model.pt",
        "final.pth",
    ],
)
def test_only_file_that_can_be_weights_is_taken_and_said_to_be(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / name, A)
    for other in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"):
        torch.save({}, tmp_path / other)
    with caplog.at_level(logging.INFO):
        assert read_index(tmp_path).keys() == {"a"}
    assert f"({name})" in caplog.text


def test_index_of_a_variant_names_its_shards(tmp_path: Path) -> None:
    save(tmp_path / "model.fp16-00001-of-00001.safetensors", A)
    index = {"weight_map": {"a": "model.fp16-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
    assert read_index(tmp_path).keys() == {"a"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("model.fp16.safetensors", "model.bf16.safetensors"),
            "several variants of its weights: model.bf16.safetensors",
        ),
        (("one.safetensors", "two.safetensors"), "several files that could be its weights: one.safetensors, two"),
        (
            ("epoch-1.ckpt", "epoch-2.ckpt"),
            "several files that could be its weights: epoch-1.ckpt, epoch-2.ckpt; leave",
        ),
        (("hf_model_0001_0.pt", "hf_model_0001_1.pt"), "several rows of shards without an index: hf_model_0001_0.pt"),
    ],
)
def test_several_that_could_be_meant_are_listed_and_none_is_taken(
    tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    for name in names:
        save(tmp_path / name, A)
    with pytest.raises(CheckpointError, match=message):
        read_index(tmp_path)


def test_folder_that_is_called_as_a_file_is_read(tmp_path: Path) -> None:
    save(tmp_path / "pytorch_model.bin" / "pytorch_model-00001-of-00001.bin", A)
    index = {"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}
    (tmp_path / "pytorch_model.bin" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert read_index(tmp_path).keys() == {"a"}


def test_weights_of_transformers_own_names_come_first(tmp_path: Path) -> None:
    save(tmp_path / "model.fp16.safetensors", B)
    save(tmp_path / "other.safetensors", B)
    save(tmp_path / "pytorch_model.bin", A)
    assert read_index(tmp_path).keys() == {"a"}


def test_links_of_the_hubs_cache_are_read_where_they_lead(tmp_path: Path) -> None:
    save(tmp_path / "blobs" / "x.safetensors", A)
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(tmp_path / "blobs" / "x.safetensors")
    assert read_index(snapshot).keys() == {"a"}
