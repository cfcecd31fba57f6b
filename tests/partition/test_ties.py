"""What config.json ties and the checkpoint holds with other values is not tied, as in transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from families import random_model, save_random_model, tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel, T5Config

from ts_parallel.checkpoint.index import read_index
from ts_parallel.partition.build import make_programs
from ts_parallel.partition.match import untie
from ts_parallel.partition.model.deferred import build_deferred
from ts_parallel.partition.model.model_config import read_model_config
from ts_parallel.partition.prepared import _digest
from ts_parallel.partition.program import ProgramRequest

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def save_tied(folder: Path, change: float, rows: slice = slice(None)) -> Path:
    """A checkpoint whose config ties the head to the embedding, from which its stored one differs by a factor."""
    save_random_model(folder, tiny("llama", tie_word_embeddings=True)())
    tensors = load_file(folder / "model.safetensors")
    head = tensors[EMBEDDING].clone()
    head[rows] *= 1 + change
    save_file({**tensors, HEAD: head}, folder / "model.safetensors")
    return folder


def deferred(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return build_deferred(read_model_config(folder), dtype)


def is_tied(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("rows", [slice(None), slice(127, 128)])
def test_head_of_other_values_has_a_parameter_of_its_own(tmp_path: Path, rows: slice) -> None:
    model = deferred(save_tied(tmp_path, 0.5, rows))
    assert is_tied(model)
    assert untie(model, read_index(tmp_path)) == (HEAD,)
    assert not is_tied(model) and model.get_parameter(HEAD).is_meta
    assert not is_tied(AutoModelForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize(("dtype", "is_one"), [(torch.float32, False), (torch.bfloat16, True)])
def test_values_are_compared_in_the_dtype_that_runs(tmp_path: Path, dtype: torch.dtype, is_one: bool) -> None:
    save_tied(tmp_path, 0.0)
    tensors = load_file(tmp_path / "model.safetensors")
    whole = tensors[EMBEDDING].bfloat16().float()
    save_file({**tensors, EMBEDDING: whole, HEAD: whole * (1 + 1e-5)}, tmp_path / "model.safetensors")
    model = deferred(tmp_path, dtype)
    untie(model, read_index(tmp_path))
    assert is_tied(model) == is_tied(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)) == is_one


@pytest.mark.parametrize("lost", [None, HEAD, EMBEDDING])
def test_equal_values_and_a_single_stored_one_stay_tied(tmp_path: Path, lost: str | None) -> None:
    tensors = load_file(save_tied(tmp_path, 0.0) / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, tmp_path / "model.safetensors")
    model = deferred(tmp_path)
    assert untie(model, read_index(tmp_path)) == ()
    assert is_tied(model)


def test_of_several_that_are_tied_only_the_other_one_is_untied(tmp_path: Path) -> None:
    config = T5Config(
        d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32, decoder_start_token_id=0
    )  # fmt: skip
    model = AutoModelForSeq2SeqLM.from_config(config)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    shared = tensors["shared.weight"]
    tensors |= {"encoder.embed_tokens.weight": shared.clone(), "lm_head.weight": shared * 2}
    save_file(tensors, tmp_path / "model.safetensors")
    own = build_deferred(config, torch.float32, AutoModelForSeq2SeqLM, "eager")
    assert untie(own, read_index(tmp_path)) == ("lm_head.weight",)
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        tied = [each.get_parameter(name) is each.get_parameter("shared.weight") for each in (own, theirs)]
        assert tied == [name != "lm_head.weight"] * 2, name


def test_program_says_what_is_untied_and_reads_both(tmp_path: Path) -> None:
    save_tied(tmp_path, 0.5)
    programs = make_programs(ProgramRequest(tmp_path, "float32", 0, 2), read_index(tmp_path))
    for program in programs.values():
        assert program.untied == (HEAD,)
        assert program.sources[HEAD][0].stored.name == HEAD
        assert program.sources[EMBEDDING][0].stored.name == EMBEDDING
        assert program.head == HEAD


def test_kept_program_is_not_that_of_a_head_which_was_changed(tmp_path: Path) -> None:
    save_tied(tmp_path, 0.0)
    request = ProgramRequest(tmp_path, "float32", 0, 2)
    before = _digest(request, read_index(tmp_path))
    assert _digest(request, read_index(tmp_path)) == before
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, HEAD: tensors[HEAD] * 2}, tmp_path / "model.safetensors")
    os.utime(tmp_path / "model.safetensors", (1, 1))
    assert _digest(request, read_index(tmp_path)) != before


def test_kept_program_of_a_model_that_ties_nothing_is_that_of_its_copies(tmp_path: Path) -> None:
    random_model(tiny("llama", tie_word_embeddings=False)()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    request = ProgramRequest(tmp_path, "float32", 0, 2)
    before = _digest(request, read_index(tmp_path))
    os.utime(tmp_path / "model.safetensors", (1, 1))
    assert _digest(request, read_index(tmp_path)) == before
