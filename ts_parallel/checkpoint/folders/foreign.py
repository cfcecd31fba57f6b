"""Folders that hold a model in a form that is not read here: by which file one knows them, what they are, and what
turns them into one that is read. Names alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ts_parallel.errors import CheckpointError

ADAPTER_SETTINGS = "adapter_config.json"
_LINES_OF_FLAX = "in transformers 4 by `AutoModel.from_pretrained(FOLDER, from_{}=True).save_pretrained(OUT)`"


@dataclass(frozen=True)
class _Kind:
    patterns: tuple[str, ...]
    """Of its files, any of them."""
    what: str
    way: str
    """What makes a folder of it that is read here."""


_CONVERT = "convert it "
_KINDS = (
    _Kind(
        (
            *("*zero_pp_rank_*_optim_states.pt", "*mp_rank_*_model_states.pt"),
            *("global_step*/*zero_pp_rank_*_optim_states.pt", "global_step*/*mp_rank_*_model_states.pt"),
        ),
        "a part of a DeepSpeed checkpoint",
        "join them by the `zero_to_fp32.py` that DeepSpeed wrote beside them: `python zero_to_fp32.py FOLDER OUT`",
    ),
    _Kind(
        ("layer_*-model_*-model_states.pt", "global_step*/layer_*-model_*-model_states.pt"),
        "a layer of a DeepSpeed pipeline, as GPT-NeoX writes it",
        _CONVERT + "by the converter of the library that wrote it (GPT-NeoX: tools/ckpts/convert_neox_to_hf.py)",
    ),
    _Kind(
        (
            *("mp_rank_*/model_optim_rng.pt", "iter_*/mp_rank_*/model_optim_rng.pt"),
            "latest_checkpointed_iteration.txt",
        ),
        "a part of a Megatron checkpoint, whose names and fused weights are Megatron's own",
        _CONVERT + "by Megatron-Bridge (`AutoBridge.export_ckpt`) or Megatron's tools/checkpoint/convert.py",
    ),
    _Kind(("*.nemo",), "a NeMo archive", _CONVERT + "by NeMo (`nemo.collections.llm.export_ckpt`, target hf)"),
    _Kind(
        ("consolidated*.safetensors", "consolidated*.pth"),
        "weights under the names of their authors, with no config.json to tell the model's sizes",
        "fetch the same model in transformers' format, or convert it by convert_mistral_weights_to_hf.py or "
        "convert_llama_weights_to_hf.py of transformers' repository (src/transformers/models)",
    ),
    _Kind(("flax_model*.msgpack",), "a model of Flax", _CONVERT + _LINES_OF_FLAX.format("flax")),
    _Kind(("tf_model*.h5", "model.ckpt.index"), "a model of TensorFlow", _CONVERT + _LINES_OF_FLAX.format("tf")),
    _Kind(("rust_model.ot",), "a model of rust-bert", "fetch the same model as safetensors"),
    _Kind(("*.onnx", "onnx/*.onnx", "openvino_model.xml"), "an exported graph", "serve the model that it was made of"),
    _Kind(("weights*.npz",), "a model of MLX or NumPy", "fetch the same model as safetensors"),
    _Kind(("ggml*.bin",), "a model of llama.cpp before GGUF", "take the model as GGUF or as safetensors"),
)


def refuse_foreign(folder: Path) -> None:
    """
    Raises:
        CheckpointError: the folder holds a model, or a part of one, in a form that is not read here.
    """
    _refuse_adapter(folder)
    for kind in _KINDS:
        for file in _files(folder, kind):
            way = kind.way.replace("FOLDER", str(folder))
            raise CheckpointError(f"{folder} holds {file.relative_to(folder)}, {kind.what}: {way}")


def refuse_megatron(folder: Path) -> None:
    """Told of a folder with `.metadata`, which Megatron's own kind of torch.distributed.checkpoint has too.

    Raises:
        CheckpointError: it is Megatron's.
    """
    backend = None
    try:
        content = json.loads((folder / "metadata.json").read_bytes())
        backend = content.get("sharded_backend")
    except (OSError, ValueError, AttributeError, RecursionError):
        pass
    if backend == "torch_dist" or (folder / "common.pt").is_file():
        file = "metadata.json" if backend is not None else "common.pt"
        raise CheckpointError(
            f"{folder} is a checkpoint of Megatron ({file}), whose names and fused weights are Megatron's own: convert "
            "it by Megatron-Bridge (`AutoBridge.export_ckpt`)"
        )


def refuse_adapter_beside(folder: Path) -> None:
    """Told of a folder that holds a model.

    Raises:
        CheckpointError: an adapter's settings lie there too, by which transformers with PEFT would take the adapter
            and another model.
    """
    if (file := folder / ADAPTER_SETTINGS).is_file():
        raise CheckpointError(
            f"{folder} holds an adapter{_base_of(file)} ({ADAPTER_SETTINGS}) beside a model: move the adapter's files "
            "to a folder of their own and name it (--adapter, handler key adapter_path), or take them away to serve "
            "the model as it is"
        )


def _refuse_adapter(folder: Path) -> None:
    if (file := folder / ADAPTER_SETTINGS).is_file():
        raise CheckpointError(
            f"{folder} is an adapter{_base_of(file)} ({ADAPTER_SETTINGS}) and no model: serve the model that it was "
            "trained on, and name this folder as its adapter (--adapter, handler key adapter_path)"
        )


def _base_of(adapter_settings: Path) -> str:
    try:
        base = json.loads(adapter_settings.read_bytes()).get("base_model_name_or_path")
    except (ValueError, AttributeError, RecursionError):
        return ""
    return f" of {base}" if isinstance(base, str) and base else ""


def _files(folder: Path, kind: _Kind) -> Iterator[Path]:
    for pattern in kind.patterns:
        yield from sorted(file for file in folder.glob(pattern))
