"""Encoders and image models over stages and ranks are the plain model, padding and pooling included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from places import RANKS
from programs import keep_for_ranks
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from whole_model import build_rank_model

from ts_parallel.config import BatchConfig
from ts_parallel.errors import CheckpointError, ConfigError, PlanError
from ts_parallel.partition.build import cut_dense, shard_dense
from ts_parallel.partition.load import RankModel
from ts_parallel.partition.model.encoder import TASKS, ModelCall, call_of_task, longest_text
from ts_parallel.partition.program import PipelinePlace
from ts_parallel.runtime.backends.torch.backend import TorchBackend
from ts_parallel.runtime.stage import Stage
from ts_parallel.topology import TensorParallelGroup

SCRIPT = RANKS / "encoder.py"
ALONE = TensorParallelGroup(0, 1)
CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 97,
    "max_position_embeddings": 64,
}
TEXT: dict[str, dict[str, Any]] = {
    "bert": SIZES,
    "roberta": SIZES,
    "xlm-roberta": SIZES,
    "distilbert": {"dim": 64, "n_layers": 4, "n_heads": 4, "hidden_dim": 128, "vocab_size": 97},
    "electra": {**SIZES, "embedding_size": 32},
    "mpnet": SIZES,  # attention code of its own
    "deberta-v2": {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    "modernbert": {
        **SIZES,
        "local_attention": 8,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1),
    },
}
SQUARE: dict[str, Any] = {**SIZES, "image_size": 32, "patch_size": 8}
IMAGES: dict[str, dict[str, Any]] = {"vit": SQUARE, "dinov2": SQUARE, "beit": SQUARE}
WHOLE: dict[str, dict[str, Any]] = {  # layers that cannot be told apart
    "albert": {**SIZES, "embedding_size": 32},
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"},
}
Inputs = dict[str, torch.Tensor]


def config_of(model_type: str) -> PretrainedConfig:
    settings = {**TEXT, **IMAGES, **WHOLE}[model_type]
    labels = {} if model_type in TEXT or model_type == "albert" else {"num_labels": 5}
    return CONFIG_MAPPING[model_type](**settings, **labels)


def task_of(model_type: str) -> str:
    return "encoder" if model_type in TEXT or model_type == "albert" else "image_classification"


def inputs_of(task: str) -> Inputs:
    """Four texts, all but one padded; or four images."""
    generator = torch.Generator().manual_seed(0)
    if task == "image_classification":
        return {"pixel_values": torch.randn(4, 3, 32, 32, generator=generator)}
    mask = (torch.arange(12) < torch.tensor([[12], [7], [1], [11]])).long()
    return {
        "input_ids": torch.randint(3, 97, mask.shape, generator=generator).where(mask == 1, torch.tensor(1)),
        "attention_mask": mask,
    }


def save_model(folder: Path, call: ModelCall, config: PretrainedConfig) -> PreTrainedModel:
    """A checkpoint to which every tensor matters, and the model itself."""
    torch.manual_seed(0)
    plain: PreTrainedModel = call.auto_class.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    plain.save_pretrained(folder)
    return plain


def save(folder: Path, model_type: str) -> tuple[str, Inputs, torch.Tensor]:
    """A model's task, its inputs, and the plain model's output."""
    task, config = task_of(model_type), config_of(model_type)
    call = call_of_task(task, folder, config, torch.float32)
    plain, inputs = save_model(folder, call, config), inputs_of(task)
    with torch.inference_mode():
        return task, inputs, call.call(plain, inputs)


def build(folder: Path, task: str, rank: int = 0, num_ranks: int = 1) -> RankModel:
    return build_rank_model(folder, "float32", ALONE, CPU, PipelinePlace(rank, num_ranks), task)


@torch.inference_mode()
def run(parts: list[RankModel], inputs: Inputs) -> torch.Tensor:
    carried: list[torch.Tensor] = []
    sizes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
    for part in parts:
        stage = Stage(part.program.stages[0], part.tensors, ALONE, TorchBackend())
        assert [crossing.shape(sizes) for crossing in stage.received] == [tuple(tensor.shape) for tensor in carried]
        carried = stage(None, {name: inputs[name] for name in stage.inputs}, carried)
    assert tuple(carried[0].shape) == parts[-1].program.outputs[0].shape(sizes)
    return carried[0]


def assert_close(output: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.05
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", [*TEXT, *IMAGES])
def test_one_stage_and_two_are_the_plain_model(model_type: str, tmp_path: Path) -> None:
    task, inputs, expected = save(tmp_path, model_type)
    parts = [build(tmp_path, task, rank, 2) for rank in range(2)]
    assert_close(run(parts, inputs), expected)
    for part in parts:
        assert 0 < part.program.plan.local_bytes(0) < 0.75 * part.program.whole_plan.local_bytes(0)
    (whole,) = (build(tmp_path, task),)
    assert_close(run([whole], inputs), expected)
    one = {name: tensor[1:2] for name, tensor in inputs.items()}
    assert_close(run([whole], one), expected[1:2])
    assert set().union(*(part.program.plan.parameters for part in parts)) == whole.program.whole_plan.parameters.keys()


@pytest.mark.parametrize("model_type", WHOLE)
def test_model_without_a_list_of_its_layers_runs_whole_and_is_not_cut(model_type: str, tmp_path: Path) -> None:
    task, inputs, expected = save(tmp_path, model_type)
    assert_close(run([build(tmp_path, task)], inputs), expected)
    with pytest.raises(PlanError, match="1 layer cannot be cut into 2 stages"):
        build(tmp_path, task, 0, 2)


def test_padding_does_not_change_a_text(tmp_path: Path) -> None:
    task, inputs, _ = save(tmp_path, "bert")
    part = build(tmp_path, task)
    padded = run([part], inputs)
    for row, length in enumerate((12, 7, 1, 11)):
        alone = run([part], {name: tensor[row : row + 1, :length] for name, tensor in inputs.items()})
        torch.testing.assert_close(padded[row : row + 1, :length], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "electra", "vit", "dinov2", "beit"])
def test_two_ranks_halve_the_layers(model_type: str, tmp_path: Path) -> None:
    call = call_of_task(task_of(model_type), tmp_path, config_of(model_type), torch.float32)
    plan = shard_dense(config_of(model_type), call, torch.float32, TensorParallelGroup(0, 2)).plan
    matrices = [entry for entry in plan.parameters.values() if ".layer" in entry.name and len(entry.shape) == 2]
    assert len(matrices) == 4 * 6
    assert [entry.name for entry in matrices if 2 * entry.local_bytes(0) != torch.Size(entry.shape).numel() * 4] == []


@pytest.mark.parametrize("model_type", ["mpnet", "modernbert", "resnet"])
def test_model_whose_attention_cannot_be_split_is_kept_whole(model_type: str, tmp_path: Path) -> None:
    """But for the rows of its embedding."""
    call = call_of_task(task_of(model_type), tmp_path, config_of(model_type), torch.float32)
    sharded = shard_dense(config_of(model_type), call, torch.float32, TensorParallelGroup(1, 2))
    split = {name for name, entry in sharded.plan.parameters.items() if entry.slices}
    assert all("embedding" in name for name in split)


@pytest.mark.ranks
@pytest.mark.parametrize(("size", "model_types"), [(2, ("bert", "vit")), (3, ("bert", "deberta-v2", "vit"))])
def test_ranks_compute_what_the_plain_model_does(size: int, model_types: tuple[str, ...], tmp_path: Path) -> None:
    """Four heads; of three ranks one has two of them."""
    expected = {}
    for model_type in model_types:
        task, inputs, expected[model_type] = save(tmp_path / model_type, model_type)
        torch.save((task, inputs), tmp_path / model_type / "inputs.pt")
        keep_for_ranks(tmp_path / model_type, {"task": task, "dtype": "float32", "tensor_parallel_size": size})
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [*ranks, str(SCRIPT), *(str(tmp_path / model_type) for model_type in expected)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert result.returncode == 0, result.stderr
    for model_type, wanted in expected.items():
        for rank in range(size):
            assert_close(torch.load(tmp_path / model_type / f"output-{rank}.pt", weights_only=True), wanted)


def test_texts_are_classified_as_the_plain_model_does(tmp_path: Path) -> None:
    """Pairs too, whose second text has other token types."""
    config = CONFIG_MAPPING["bert"](**SIZES, num_labels=3)
    call = call_of_task("text_classification", tmp_path, config, torch.float32)
    plain, inputs = save_model(tmp_path, call, config), inputs_of("text_classification")
    inputs["token_type_ids"] = (torch.arange(12) > 4).long().expand(4, 12)
    assert inputs.keys() == call.inputs.keys()
    with torch.inference_mode():
        expected = plain(**inputs).logits
    assert expected.shape == (4, 3)
    parts = [build(tmp_path, "text_classification", rank, 2) for rank in range(2)]
    assert_close(run(parts, inputs), expected)


def save_pooling(folder: Path, settings: dict[str, Any], kinds: tuple[str, ...] = ("Transformer", "Pooling")) -> None:
    """The files in which sentence-transformers keeps how a model pools."""
    modules = [
        {"idx": number, "path": f"{number}_{kind}", "type": f"sentence_transformers.models.{kind}"}
        for number, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **settings}))


def by_hand(hidden: torch.Tensor, mask: torch.Tensor, mode: str) -> torch.Tensor:
    """Each text by itself, without its padding."""
    texts = [states[: int(own.sum())] for states, own in zip(hidden, mask, strict=True)]
    pool = {"mean": lambda text: text.mean(0), "cls": lambda text: text[0], "max": lambda text: text.max(0).values}
    return torch.stack([pool[mode](text) for text in texts])


@pytest.mark.parametrize("is_normalised", [False, True])
@pytest.mark.parametrize(("mode", "key"), [("mean", "mean_tokens"), ("cls", "cls_token"), ("max", "max_tokens")])
def test_texts_are_pooled_as_their_folder_says(mode: str, key: str, is_normalised: bool, tmp_path: Path) -> None:
    _, inputs, hidden = save(tmp_path, "bert")
    others = {f"pooling_mode_{name}": False for name in ("cls_token", "mean_tokens", "max_tokens")}
    kinds = ("Transformer", "Pooling", *["Normalize"] * is_normalised)
    save_pooling(tmp_path, {**others, f"pooling_mode_{key}": True}, kinds)
    expected = by_hand(hidden, inputs["attention_mask"], mode)
    if is_normalised:
        expected = expected / expected.norm(dim=1, keepdim=True)
    output = run([build(tmp_path, "text_embedding")], inputs)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_texts_are_pooled_by_their_mean_where_nothing_is_said(tmp_path: Path) -> None:
    _, inputs, hidden = save(tmp_path, "bert")
    output = run([build(tmp_path, "text_embedding", rank, 2) for rank in range(2)], inputs)
    assert_close(output, by_hand(hidden, inputs["attention_mask"], "mean"))


@pytest.mark.parametrize(
    ("settings", "kinds", "message"),
    [
        (
            {"pooling_mode": ["cls", "zork"]},
            ("Transformer", "Pooling"),
            r"pools by \['zork'\]; \['cls', .*\] can be served",
        ),
        ({"pooling_mode_cls_token": True}, ("Transformer", "Pooling", "CNN"), "has a module 'CNN', which cannot be"),
    ],
)
def test_pooling_that_is_not_known_is_refused(
    settings: dict[str, Any], kinds: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    save_pooling(tmp_path, settings, kinds)
    with pytest.raises(CheckpointError, match=message):
        call_of_task("text_embedding", tmp_path, config_of("bert"), torch.float32)


@pytest.mark.parametrize("text", ["{", None])
def test_pooling_that_cannot_be_read_is_refused_with_its_file(text: str | None, tmp_path: Path) -> None:
    save_pooling(tmp_path, {})
    file = tmp_path / "1_Pooling" / "config.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(CheckpointError, match=f"cannot read {file}"):
        call_of_task("text_embedding", tmp_path, config_of("bert"), torch.float32)


def test_every_task_can_be_configured() -> None:
    assert set(get_args(BatchConfig.model_fields["task"].annotation)) == set(TASKS)


def test_unknown_task_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task 'zork' is none of \['text_embedding', .*'encoder'\]"):
        call_of_task("zork", tmp_path, config_of("bert"), torch.float32)


@pytest.mark.parametrize(("model_type", "longest"), [("bert", 64), ("roberta", 62), ("mpnet", 62), ("modernbert", 64)])
def test_text_may_be_as_long_as_there_are_positions(model_type: str, longest: int, tmp_path: Path) -> None:
    """RoBERTa and its kin count positions from behind the padding id, so two of the 64 are never used."""
    config = config_of(model_type)
    assert longest_text(config) == longest
    call = call_of_task("encoder", tmp_path, config, torch.float32)
    plain = save_model(tmp_path, call, config)
    inputs = {"input_ids": torch.full((1, longest), 5), "attention_mask": torch.ones(1, longest, dtype=torch.int64)}
    with torch.inference_mode():
        call.call(plain, inputs)
        if model_type != "modernbert":  # whose positions are no table
            longer = {name: torch.cat([tensor, tensor[:, :1]], 1) for name, tensor in inputs.items()}
            with pytest.raises((IndexError, RuntimeError)):
                call.call(plain, longer)


def test_model_that_cannot_run_without_data_is_refused_by_name(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["longformer"](**SIZES, attention_window=4)
    call = call_of_task("encoder", tmp_path, config, torch.float32)
    with pytest.raises(PlanError, match="LongformerModel cannot run without data"):
        cut_dense(shard_dense(config, call, torch.float32, ALONE), call, PipelinePlace())
