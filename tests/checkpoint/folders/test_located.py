"""A path stands for one checkpoint, or a line says for which it could stand, or what is there instead."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from stored_checkpoints import STORED_REFUSED

from ts_parallel.checkpoint.adapter import read_adapter
from ts_parallel.checkpoint.folders.located import checkpoint_folder
from ts_parallel.checkpoint.index import read_index
from ts_parallel.checkpoint.settings import settings_folder
from ts_parallel.errors import CheckpointError


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    save_file({"x": torch.zeros(2)}, folder / "model.safetensors")
    return folder


def test_one_checkpoint_in_a_trainers_folder_is_taken_and_said_to_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = checkpoint(tmp_path / "checkpoint-500")
    (tmp_path / "runs").mkdir()
    (tmp_path / "training_args.bin").touch()
    with caplog.at_level(logging.WARNING):
        assert checkpoint_folder(tmp_path) == own
    assert f"{tmp_path} holds no weights itself; the checkpoint in its folder checkpoint-500 is taken" in caplog.text


def test_several_are_listed_by_their_numbers_and_none_is_taken(tmp_path: Path) -> None:
    for number in (1000, 90, 500):
        checkpoint(tmp_path / f"checkpoint-{number}")
    message = f"checkpoint-90, checkpoint-500, checkpoint-1000 do: name the one .*{tmp_path / 'checkpoint-1000'}$"
    with pytest.raises(CheckpointError, match=message):
        checkpoint_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"its folders checkpoint-90/, .* hold weights: name one of them"):
        read_index(tmp_path)


def test_folder_with_weights_of_its_own_is_taken_whatever_else_it_holds(tmp_path: Path) -> None:
    own = checkpoint(tmp_path / "model")
    checkpoint(own / "checkpoint-1")
    (own / "adapter_config.json").write_text("{}")
    assert checkpoint_folder(own) == own


def test_parts_of_a_sentence_model_are_no_checkpoints(tmp_path: Path) -> None:
    checkpoint(tmp_path / "0_Transformer")
    (tmp_path / "modules.json").write_text("[]")
    assert checkpoint_folder(tmp_path) == tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "global_step8/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
            r"DeepSpeed .*: `python zero_to_fp32.py {folder}",
        ),
        ("mp_rank_00_model_states.pt", r"a part of a DeepSpeed checkpoint: join them by the `zero_to_fp32.py`"),
        ("layer_00-model_00-model_states.pt", r"DeepSpeed pipeline.*convert_neox_to_hf.py"),
        ("iter_0000010/mp_rank_00/model_optim_rng.pt", r"Megatron checkpoint, .* Megatron-Bridge"),
        ("llama.nemo", r"a NeMo archive: convert it by NeMo"),
        ("flax_model.msgpack", r"a model of Flax: .*from_pretrained\({folder}, from_flax=True\)"),
        ("tf_model.h5", r"a model of TensorFlow: .*from_tf=True"),
        ("onnx/model.onnx", r"an exported graph: serve the model that it was made of"),
    ],
)
def test_what_is_not_read_is_named_with_what_makes_it_so(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    for road in (checkpoint_folder, read_index):
        with pytest.raises(CheckpointError, match=f"^{tmp_path} holds {name}, .*{message.format(folder=tmp_path)}"):
            road(tmp_path)


@pytest.mark.parametrize("name", ["consolidated.safetensors", "consolidated.00.pth"])
def test_names_of_authors_need_a_configuration(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    (tmp_path / "params.json").write_text("{}")
    assert checkpoint_folder(tmp_path) == tmp_path
    with pytest.raises(CheckpointError, match=rf"holds {name}, .* no config.json to tell .* convert_mistral_weights"):
        read_index(tmp_path)
    with pytest.raises(CheckpointError, match=rf"^no config.json in {tmp_path}, whose {name} has its authors' names"):
        settings_folder(tmp_path)


def test_adapter_that_is_given_as_the_model_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    (tmp_path / "adapter_model.safetensors").touch()
    for road in (checkpoint_folder, read_index):
        with pytest.raises(
            CheckpointError, match=r"is an adapter of owner/base .* \(--adapter, handler key adapter_path"
        ):
            road(tmp_path)


def test_distributed_checkpoint_of_megatron_is_told_from_torchs_own(tmp_path: Path) -> None:
    (tmp_path / ".metadata").touch()
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    with pytest.raises(CheckpointError, match=r"is a checkpoint of Megatron \(metadata.json\)"):
        read_index(tmp_path)


@pytest.mark.parametrize("kind", STORED_REFUSED)
def test_kind_of_the_table_that_is_not_read_is_refused_on_one_line(kind: str, tmp_path: Path) -> None:
    writer, says = STORED_REFUSED[kind]
    writer(tmp_path / "own", tmp_path / "plain")
    with pytest.raises(CheckpointError) as refusal:
        index = read_index(checkpoint_folder(tmp_path / "own"))
        read_adapter(tmp_path / "adapter", index)
    assert says in str(refusal.value) and "\n" not in str(refusal.value)


def test_folder_without_weights_is_shown(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "config.json").touch()
    with pytest.raises(CheckpointError, match=r"^neither model.safetensors .*, which holds config.json, notes/$"):
        read_index(tmp_path)
