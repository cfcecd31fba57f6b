"""Of all that a trainer saves, the model's tensors are found, under the names that the model itself has for them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ts_parallel.checkpoint.folders.model_names import find_model_names
from ts_parallel.errors import CheckpointError

LLAMA = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]
TIED = LLAMA[:-1]
GPT2 = ["transformer.wte.weight", "transformer.h.0.attn.c_attn.weight", "lm_head.weight"]
BASE = ["wte.weight", "h.0.attn.c_attn.weight"]
MODELS = {"llama": LLAMA, "tied": TIED, "gpt2": GPT2, "base model": BASE}

Words = tuple[str | int, ...]
OPTIMIZER: list[Words] = [("optim", "state", name, "exp_avg") for name in LLAMA]


def found(paths: list[Words]) -> set[str]:
    return set(find_model_names({".".join(map(str, path)): path for path in paths}, Path("saved")).values())


def flat(*groups: list[str]) -> list[Words]:
    """As where nothing is known of the dicts that the names stood in."""
    return [(name,) for group in groups for name in group]


@pytest.mark.parametrize("names", MODELS.values(), ids=MODELS.keys())
def test_state_dict_alone_keeps_its_names(names: list[str]) -> None:
    assert found(flat(names)) == set(names)


@pytest.mark.parametrize("names", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("wrappers", [("model",), ("state_dict",), ("app", "model"), ("module",), ("model", "module")])
def test_state_dict_in_other_dicts_loses_their_words_only(names: list[str], wrappers: Words) -> None:
    own: list[Words] = [(*wrappers, name) for name in names]
    assert found(own) == set(names)
    assert found([*own, *OPTIMIZER, ("epoch",), ("lr_scheduler", "last_lr", 0)]) == set(names)


@pytest.mark.parametrize("names", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize(
    "prefix",
    [
        *("module.", "state_dict.", "_orig_mod.", "module._orig_mod.", "app.model.module.", "pretrained_model."),
        *(
            "base_model.model.",
            "module.base_model.model.",
            "model.base_model.model.",
            "_fsdp_wrapped_module._fpw_module.",
        ),
    ],
)
def test_prefix_of_a_wrapper_is_taken_from_every_name(names: list[str], prefix: str) -> None:
    assert found(flat([prefix + name for name in names])) == set(names)


def test_word_of_a_wrapper_is_taken_from_within_names() -> None:
    layers = ["model.layers.0._orig_mod.mlp.up_proj.weight", "model.layers.1._fsdp_wrapped_module.mlp.up_proj.weight"]
    assert found(flat(layers)) == {"model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"}


@pytest.mark.parametrize("names", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("prefix", ["", "pretrained_model.", "module."])
def test_value_head_beside_a_model_is_left_alone(names: list[str], prefix: str) -> None:
    heads = ["v_head.summary.weight", "v_head.summary.bias"]
    assert found(flat([f"{prefix}{name}" for name in names], heads)) == set(names)
    assert found(flat([f"{prefix}{name}" for name in [*names, *heads]])) == set(names)


def test_what_was_taken_away_and_left_is_a_line_each(caplog: pytest.LogCaptureFixture) -> None:
    layers = ["model.embed_tokens.weight", "model.layers.0._orig_mod.mlp.up_proj.weight", "lm_head.weight"]
    with caplog.at_level(logging.INFO):
        found(flat([f"module.{name}" for name in layers], ["v_head.summary.weight"]))
        found(flat(LLAMA))
    assert [record.getMessage() for record in caplog.records] == [
        "saved: names are read without '_orig_mod', 'module'",
        "saved: 1 tensors beside the model are left alone: 'v_head.summary.weight'",
    ]


@pytest.mark.parametrize(
    "name",
    [
        *("layers.0.q_proj.lora_A.default.weight", "layers.0.q_proj.base_layer.weight"),
        *("lm_head.modules_to_save.default.weight", "lm_head.original_module.weight"),
    ],
)
def test_adapter_within_a_model_is_refused_with_what_to_do(name: str) -> None:
    names = [f"base_model.model.{own}" for own in [*LLAMA, f"model.{name}"]]
    with pytest.raises(CheckpointError, match=rf"holds 'base_model\.model\.model\.{name}': .* merge_and_unload"):
        found(flat(names))


@pytest.mark.parametrize("names", [LLAMA, TIED, GPT2], ids=["llama", "tied", "gpt2"])
def test_model_before_every_name_is_a_wrapper_where_the_rest_is_the_name_of_a_whole_model(names: list[str]) -> None:
    assert found(flat([f"model.{name}" for name in names])) == set(names)


def test_model_before_every_name_is_a_wrapper_where_an_optimizer_stands_beside_it() -> None:
    optimizer = [f"optim.state.{name}.exp_avg" for name in BASE]
    assert found(flat([f"model.{name}" for name in BASE], optimizer)) == set(BASE)


def test_loose_tensors_beside_a_model_are_a_trainers() -> None:
    assert found([*[("model", name) for name in LLAMA], ("tokens_seen",)]) == set(LLAMA)


def test_dicts_within_a_model_are_parts_of_its_names() -> None:
    assert found([("model", "encoder", "norm.weight"), ("model", "head", "weight")]) == {
        "encoder.norm.weight",
        "head.weight",
    }


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (OPTIMIZER, r"saved holds no tensor of a model, only 'optim\.state\..*, …$"),
        ([], "saved holds no tensor of a model"),
        ([("model", "x"), ("state_dict", "x")], "several models, under 'model' and 'state_dict'"),
        (flat(["x.weight", "_orig_mod.x.weight"]), "two have the same name"),
    ],
)
def test_what_is_no_one_model_is_refused(paths: list[Words], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        found(paths)
