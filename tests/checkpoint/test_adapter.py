"""A LoRA adapter on disk is in the weights once they are loaded, whatever part of them a rank keeps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ts_parallel.checkpoint.adapter import read_adapter
from ts_parallel.checkpoint.index import CheckpointIndex, read_index
from ts_parallel.checkpoint.load import LoadItem, load_tensors
from ts_parallel.checkpoint.progress import Progress
from ts_parallel.checkpoint.stored import Slice
from ts_parallel.errors import CheckpointError

RANK, OUTPUTS, INPUTS = 4, 12, 8
MODULES = ("model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.0.down_proj")
SETTINGS: dict[str, Any] = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "bias": "none", "fan_in_fan_out": False}


class Files:
    """A checkpoint and an adapter for two of its three weights."""

    def __init__(self, root: Path) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        self.weights = {f"{module}.weight": random(OUTPUTS, INPUTS) for module in MODULES}
        self.factors = {
            f"base_model.model.{module}.lora_{factor}.weight": random(*shape)
            for module in MODULES[:2]
            for factor, shape in (("A", (RANK, INPUTS)), ("B", (OUTPUTS, RANK)))
        }
        self.base, self.adapter = root / "base", root / "adapter"
        self.base.mkdir()
        self.adapter.mkdir()
        self.settings = dict(SETTINGS)
        self.save()

    def save(self, dtype: torch.dtype = torch.float32) -> None:
        save_file({name: weight.to(dtype) for name, weight in self.weights.items()}, self.base / "model.safetensors")
        save_file(self.factors, self.adapter / "adapter_model.safetensors")
        (self.adapter / "adapter_config.json").write_text(json.dumps(self.settings))

    @property
    def index(self) -> CheckpointIndex:
        return read_index(self.base)

    def change(self, module: str, scale: float) -> torch.Tensor:
        prefix = f"base_model.model.{module}.lora_"
        return scale * self.factors[f"{prefix}B.weight"] @ self.factors[f"{prefix}A.weight"]

    def loaded(self, name: str, kept: Slice | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        shape = list(self.index[name].shape)
        if kept is not None:
            shape[kept.dim] = kept.length
        target = torch.empty(shape, dtype=dtype)
        merge = read_adapter(self.adapter, self.index).merge
        load_tensors([LoadItem(target, self.index[name], kept)], Progress("", is_shown=False), merge)
        return target


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


KEPT = [None, Slice(0, ((3, 5),)), Slice(0, ((0, 2), (5, 3))), Slice(1, ((4, 4),)), Slice(1, ((1, 2), (6, 1)))]


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("is_transposed", [False, True])
def test_part_of_a_weight_is_that_of_the_merged_weight(files: Files, kept: Slice | None, is_transposed: bool) -> None:
    name = f"{MODULES[0]}.weight"
    expected = files.weights[name] + files.change(MODULES[0], 6 / RANK)
    if is_transposed:
        files.settings["fan_in_fan_out"] = True
        files.weights = {own: weight.T.contiguous() for own, weight in files.weights.items()}
        files.save()
        expected = expected.T
    if kept is not None:
        rows = [row for start, length in kept.pieces for row in range(start, start + length)]
        expected = expected.index_select(kept.dim, torch.tensor(rows))
    torch.testing.assert_close(files.loaded(name, kept), expected)


def test_weight_that_the_adapter_does_not_name_is_left(files: Files) -> None:
    assert torch.equal(files.loaded(f"{MODULES[2]}.weight"), files.weights[f"{MODULES[2]}.weight"])


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"use_rslora": True}, 6 / math.sqrt(RANK)),
        ({"alpha_pattern": {"layers.0.q_proj": 10}}, 10 / RANK),
        ({"alpha_pattern": {"layers.1.q_proj": 10}}, 6 / RANK),
        ({"alpha_pattern": {"q_proj": 3}, "r": 99, "rank_pattern": {".*q_proj": RANK}}, 3 / RANK),
    ],
)
def test_scale_is_the_configured_one(files: Files, settings: dict[str, Any], scale: float) -> None:
    files.settings.update(settings)
    files.save()
    name = f"{MODULES[0]}.weight"
    torch.testing.assert_close(files.loaded(name), files.weights[name] + files.change(MODULES[0], scale))


def test_half_precision_is_multiplied_in_float32(files: Files) -> None:
    files.save(torch.bfloat16)
    name = f"{MODULES[0]}.weight"
    change = files.change(MODULES[0], 6 / RANK).bfloat16()
    expected = files.weights[name].bfloat16() + change
    torch.testing.assert_close(files.loaded(name, dtype=torch.bfloat16), expected, rtol=0.01, atol=0.02)


def test_checkpoint_of_the_base_model_alone_lacks_its_prefix(files: Files) -> None:
    files.weights = {name.removeprefix("model."): weight for name, weight in files.weights.items()}
    files.save()
    name = f"{MODULES[0]}.weight".removeprefix("model.")
    torch.testing.assert_close(files.loaded(name), files.weights[name] + files.change(MODULES[0], 6 / RANK))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            ({"init_lora_weights": way}, f"init_lora_weights is '{way}', by which PEFT takes .* serve the merged model")
            for way in ("pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga", "next_years")
        ),
        ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens is \[1, 2\]: the adapter begins"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"use_qalora": True}, "use_qalora is True, and what it does to the weights is not known here"),
        ({"next_years_option": "much"}, "next_years_option is 'much', and what it does"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', only 'LORA' can be merged"),
        ({"use_dora": True}, "use_dora is True, which changes more"),
        ({"bias": "all"}, "bias is 'all', which changes more"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"r": 8}, "is 8, its factors have 4"),
        ({"lora_alpha": "much"}, "are no numbers"),
    ],
)
def test_adapter_that_does_more_is_refused(files: Files, settings: dict[str, Any], message: str) -> None:
    files.settings.update(settings)
    files.save()
    with pytest.raises(CheckpointError, match=message):
        read_adapter(files.adapter, files.index)


@pytest.mark.parametrize("way", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_initialisation_that_leaves_the_model_alone_and_keys_that_are_not_set_are_borne(
    files: Files, way: bool | str | None
) -> None:
    told = {"lora_dropout": 0.1, "target_modules": ["q_proj"], "base_model_name_or_path": "owner/base", "revision": "x"}
    unset = {"use_qalora": False, "qalora_group_size": 16, "arrow_config": None, "next_years_option": None}
    files.settings.update({"init_lora_weights": way, "megatron_core": "megatron.core", **told, **unset})
    files.save()
    name = f"{MODULES[0]}.weight"
    torch.testing.assert_close(files.loaded(name), files.weights[name] + files.change(MODULES[0], 6 / RANK))


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: f"module.{name}",
        lambda name: name.replace("layers.0", "layers.0._orig_mod"),
        lambda name: name.removeprefix("base_model.model."),
    ],
)
def test_names_of_factors_may_have_an_adapters_or_a_wrappers_or_lack_pefts(
    files: Files, change: Callable[[str], str]
) -> None:
    module, name = MODULES[0], f"{MODULES[0]}.weight"
    expected = files.weights[name] + files.change(module, 6 / RANK)
    files.factors = {change(own): factor for own, factor in files.factors.items()}
    files.save()
    torch.testing.assert_close(files.loaded(name), expected)


def test_two_adapters_in_one_file_are_refused(files: Files) -> None:
    files.factors = {
        name.replace(".weight", f".{'one' if MODULES[0] in name else 'two'}.weight"): factor
        for name, factor in files.factors.items()
    }
    files.save()
    with pytest.raises(CheckpointError, match=r"holds several adapters, of which are .*\.one\.weight' and .*\.two\."):
        read_adapter(files.adapter, files.index)


def test_file_of_torch_save_is_read_where_there_is_no_other(files: Files) -> None:
    (files.adapter / "adapter_model.safetensors").unlink()
    torch.save(files.factors, files.adapter / "adapter_model.bin")
    name = f"{MODULES[0]}.weight"
    torch.testing.assert_close(files.loaded(name), files.weights[name] + files.change(MODULES[0], 6 / RANK))


@pytest.mark.parametrize(
    "known",
    [
        "model.layers.0.q_proj.weight",
        "model.language_model.layers.0.q_proj.weight",
        "language_model.model.layers.0.q_proj.weight",
    ],
)
@pytest.mark.parametrize("own", ["model.layers.0", "model.language_model.layers.0", "language_model.model.layers.0"])
def test_module_is_found_by_the_models_name_whatever_is_stored(files: Files, known: str, own: str) -> None:
    files.factors = {name.replace("model.layers.0", own): factor for name, factor in files.factors.items()}
    files.save()
    names = {known: MODULES[2] + ".weight", "model.vision_tower.layers.0.q_proj.weight": MODULES[0] + ".weight"}
    names["model.layers.1.q_proj.weight"] = MODULES[1] + ".weight"
    assert read_adapter(files.adapter, files.index, names)._changes.keys() == {
        f"{MODULES[2]}.weight",
        f"{MODULES[1]}.weight",
    }


def test_copy_of_a_modules_own_weight_is_looked_at_and_not_merged(files: Files) -> None:
    name = f"{MODULES[0]}.weight"
    own = f"base_model.model.{MODULES[0]}.base_layer.weight"
    files.factors[own] = files.weights[name].clone()
    files.save()
    torch.testing.assert_close(files.loaded(name), files.weights[name] + files.change(MODULES[0], 6 / RANK))
    files.factors[own][3, 2] += 1
    files.save()
    with pytest.raises(CheckpointError, match=rf"holds '{own}' with other values than '{name}'"):
        read_adapter(files.adapter, files.index)


def test_weight_that_two_modules_share_is_not_changed_for_one_of_them(files: Files) -> None:
    names = {f"{module}.weight": f"{module}.weight" for module in MODULES}
    with pytest.raises(
        CheckpointError, match=r"changes 'model\.layers\.1\.q_proj', which shares its weight with another"
    ):
        read_adapter(files.adapter, files.index, {**names, f"{MODULES[1]}.weight": None})


def test_adapter_of_another_model_is_refused(files: Files) -> None:
    del files.weights[f"{MODULES[1]}.weight"]
    files.save()
    with pytest.raises(CheckpointError, match=r"changes 'model.layers.1.q_proj', the checkpoint has no"):
        read_adapter(files.adapter, files.index)
    files.weights[f"{MODULES[1]}.weight"] = torch.zeros(OUTPUTS, INPUTS + 1)
    files.save()
    with pytest.raises(CheckpointError, match=r"factors of shapes \[12, 4\] and \[4, 8\], its weight has \[12, 9\]"):
        read_adapter(files.adapter, files.index)


def test_factor_without_the_other_and_what_is_no_factor_are_refused(files: Files) -> None:
    lost = files.factors.pop(f"base_model.model.{MODULES[0]}.lora_A.weight")
    files.save()
    with pytest.raises(CheckpointError, match=r"has lora_B of 'model.layers.0.q_proj' without the other factor"):
        read_adapter(files.adapter, files.index)
    files.factors["base_model.model.embed_tokens.lora_embedding_A"] = lost
    files.save()
    with pytest.raises(CheckpointError, match=r"'base_model.model.embed_tokens.lora_embedding_A' is no LoRA factor"):
        read_adapter(files.adapter, files.index)


def test_factor_of_integers_is_refused(files: Files) -> None:
    name = f"base_model.model.{MODULES[0]}.lora_A.weight"
    files.factors[name] = torch.ones(RANK, INPUTS, dtype=torch.int8)
    files.save()
    with pytest.raises(CheckpointError, match=rf"'{name}' is int8, not of floating point numbers"):
        read_adapter(files.adapter, files.index)


def test_folder_without_an_adapter_is_refused(files: Files) -> None:
    with pytest.raises(CheckpointError, match=r"no adapter_config.json in the adapter's folder"):
        read_adapter(files.base, files.index)
    (files.adapter / "adapter_config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="is no JSON object"):
        read_adapter(files.adapter, files.index)
