"""Tiny checkpoints as people store them: under other names, in other files and folders, with an adapter beside them.

Each kind writes the weights of one model in its own way, and the model plainly, as transformers has it. What is to be
refused is a file of its name: nobody reads further.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from families import ConfigFactory, random_model, tiny
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import CONFIG_MAPPING, PretrainedConfig

Tensors = dict[str, torch.Tensor]
Writer = Callable[[Path, Path], None]
"""Writes a checkpoint into the first folder, and the plain one that it stands for into the second."""
Store = Callable[[Path, Tensors], None]

_LLAMA = tiny("llama")
HEADS, KEY_VALUE_HEADS, HIDDEN = 4, 2, 64
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4976698672\n"
_SAFETENSORS, _TORCH = "model.safetensors", "pytorch_model.bin"


def _gemma3() -> PretrainedConfig:
    """Of text and images; its text model is a part of a part."""
    kinds = ["sliding_attention", "full_attention"]
    text = tiny("gemma3_text", sliding_window=8, layer_types=kinds)().to_dict()
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes = {"image_size": 28, "patch_size": 14, "vision_use_head": False}
    return CONFIG_MAPPING["gemma3"](text_config=text, vision_config={**vision, **sizes}, mm_tokens_per_image=4)


def _write(store: Store, folder: Path, plain: Path, family: str = "llama", **settings: Any) -> None:
    """`store` is given the folder, with all that is no weights, and a model's tensors."""
    model = random_model(tiny(family, **settings)())
    model.save_pretrained(plain)
    shutil.copytree(plain, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    store(folder, {name: tensor.clone() for name, tensor in model.state_dict().items()})


def _renamed(rename: Callable[[str], str], folder: Path, tensors: Tensors, **beside: torch.Tensor) -> None:
    save_file({rename(name): tensor for name, tensor in tensors.items()} | beside, folder / _SAFETENSORS)


def _prefixed(prefix: str, folder: Path, tensors: Tensors, *beside: str) -> None:
    own = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    save_file(own | {name: torch.ones(3) for name in beside}, folder / _SAFETENSORS)


def _around_text_model(folder: Path, tensors: Tensors) -> None:
    """As a model of text and images that keeps its head outside."""
    tower = {"model.vision_tower.encoder.layers.0.mlp.fc1.weight": torch.ones(3, 3)}
    renamed = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    save_file(renamed | tower, folder / _SAFETENSORS)


def _in_shards(stem: str, end: str, folder: Path, tensors: Tensors) -> None:
    names = sorted(tensors)
    for number in range(2):
        own = {name: tensors[name] for name in names[number::2]}
        file = folder / f"{stem}-{number + 1:05d}-of-00002{end}"
        (save_file if file.suffix == ".safetensors" else torch.save)(own, file)


def _in_file(name: str, folder: Path, tensors: Tensors) -> None:
    (save_file if name.endswith(".safetensors") else torch.save)(tensors, folder / name)


def _by_old_torch(folder: Path, tensors: Tensors) -> None:
    torch.save(tensors, folder / _TORCH, _use_new_zipfile_serialization=False)


def _by_lightning(folder: Path, tensors: Tensors) -> None:
    own = {f"model.{name}": tensor for name, tensor in tensors.items()}
    content = {"state_dict": own, "epoch": 3, "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}]}
    torch.save({**content, "loops": {"fit_loop": {"epoch": 3}}, "hyper_parameters": {"lr": 0.1}}, folder / "last.ckpt")


def _by_composer(folder: Path, tensors: Tensors) -> None:
    own = {f"model.{name}": tensor for name, tensor in tensors.items()}
    state = {"model": own, "optimizers": {"AdamW": {"state": {"a": torch.ones(2)}}}, "timestamp": {"epoch": 3}}
    torch.save({"state": state, "rng": [{"torch": torch.ones(2)}]}, folder / "ep0-ba10-rank0.pt")


def _in_folder_called_as_file(folder: Path, tensors: Tensors) -> None:
    inner = folder / _TORCH
    inner.mkdir()
    _in_shards("pytorch_model", ".bin", inner, tensors)
    files = {name: f"pytorch_model-{at % 2 + 1:05d}-of-00002.bin" for at, name in enumerate(sorted(tensors))}
    (inner / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))


def _in_trainers_folder(folder: Path, tensors: Tensors, steps: tuple[int, ...] = (500,)) -> None:
    files = list(folder.iterdir())
    for step in steps:
        own = folder / f"checkpoint-{step}"
        own.mkdir()
        for file in files:
            shutil.copy(file, own)
        save_file(tensors, own / _SAFETENSORS)
        torch.save({}, own / "optimizer.pt")
    (files[0].parent / "config.json").unlink()


_OF_AUTHORS = {
    **{"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output", "model.layers": "layers"},
    **{f"self_attn.{own}_proj": f"attention.w{own}" for own in "qkvo"},
    **{"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"},
    **{"mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3"},
}


def _with_pairs(weight: torch.Tensor) -> torch.Tensor:
    """Rotary pairs as neighbours."""
    head = HIDDEN // HEADS
    return weight.view(-1, 2, head // 2, HIDDEN).transpose(1, 2).reshape(weight.shape).contiguous()


def _as_authors(tensors: Tensors) -> Tensors:
    own = {}
    for name, tensor in tensors.items():
        is_paired = "q_proj" in name or "k_proj" in name
        for theirs, ours in _OF_AUTHORS.items():
            name = name.replace(theirs, ours)
        own[name] = _with_pairs(tensor) if is_paired else tensor
    return own


def _by_meta(folder: Path, tensors: Tensors, embedding_dim: int = 1) -> None:
    """In two files, as larger models are."""
    (folder / "params.json").write_text(json.dumps({"dim": HIDDEN, "n_heads": HEADS, "n_kv_heads": KEY_VALUE_HEADS}))
    for number in range(2):
        own = {"rope.freqs": torch.ones(8)}
        for name, tensor in _as_authors(tensors).items():
            columns = any(part in name for part in (".wo.", ".w2."))
            dim = embedding_dim if name.startswith("tok_") else int(columns)
            own[name] = tensor if tensor.ndim == 1 else tensor.chunk(2, dim)[number].clone()
        torch.save(own, folder / f"consolidated.{number:02d}.pth")


def _by_mistral(folder: Path, tensors: Tensors) -> None:
    (folder / "params.json").write_text(json.dumps({"dim": HIDDEN}))
    save_file(_as_authors(tensors), folder / "consolidated.safetensors")


def _by_torchtitan(folder: Path, tensors: Tensors) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        save_distributed({"model": _as_authors(tensors)}, checkpoint_id=folder, no_dist=True)


def _by_verl(folder: Path, tensors: Tensors) -> None:
    """A file of each of two ranks, made in one process: its group of ranks only says that there are two."""
    (folder / "huggingface").mkdir()
    for name in ("config.json", "generation_config.json"):
        (folder / name).rename(folder / "huggingface" / name)
    for rank in range(2):
        dist.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
        own = {
            name: DTensor.from_local(
                tensor.chunk(2)[rank].clone(), mesh, [Shard(0)], shape=tensor.shape, stride=tensor.stride()
            )
            for name, tensor in tensors.items()
        }
        torch.save(own, folder / f"model_world_size_2_rank_{rank}.pt")
        dist.destroy_process_group()


def _by_megatron(folder: Path, tensors: Tensors) -> None:
    _by_torchtitan(folder, tensors)
    torch.save({"args": {}}, folder / "common.pt")


def _write_untied(folder: Path, plain: Path, **settings: Any) -> None:
    """A head of other values than the embedding that config.json ties it to; transformers unties them."""
    _write(partial(_in_file, _SAFETENSORS), folder, plain, **settings)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))


def _write_with_equal_head(folder: Path, plain: Path) -> None:
    """Tied, and both stored with the same values."""
    _write(partial(_in_file, _SAFETENSORS), folder, plain, tie_word_embeddings=True)


def _write_with_adapter(settings: Mapping[str, Any], folder: Path, plain: Path, config: ConfigFactory = _LLAMA) -> None:
    """An adapter beside the checkpoint, which is merged in the plain one; its names are those of PEFT."""
    model = random_model(config())
    model.save_pretrained(folder)
    factors: Tensors = {}
    scale = 2.0
    generator = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "down_proj")) and "vision" not in name:
            outputs, inputs = module.weight.shape
            down, up = (torch.randn(shape, generator=generator) / 4 for shape in ((4, inputs), (outputs, 4)))
            factors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
            module.weight.data += scale * up @ down
    model.save_pretrained(plain)
    adapter = folder.parent / "adapter"
    adapter.mkdir()
    save_file(factors, adapter / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "init_lora_weights": True, **settings}
    (adapter / "adapter_config.json").write_text(json.dumps(content))


def _plainly(name: str, content: str, folder: Path, tensors: Tensors) -> None:
    """A file of this name alone."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content)


def _file(name: str, content: str = "", **settings: Any) -> Writer:
    return partial(_write, partial(_plainly, name, content), **settings)


def _without_configuration(store: Store, folder: Path, tensors: Tensors) -> None:
    store(folder, tensors)
    (folder / "config.json").unlink()


def _with_adapter_settings(file: str, folder: Path, tensors: Tensors) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    _in_file(file, folder, tensors)


def _with_pointer(folder: Path, tensors: Tensors) -> None:
    _in_shards("model", ".safetensors", folder, tensors)
    (folder / "model-00002-of-00002.safetensors").write_text(POINTER)


def _unmerged(folder: Path, tensors: Tensors) -> None:
    _prefixed("base_model.model.", folder, tensors, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight")


def _stored(store: Store, **settings: Any) -> Writer:
    return partial(_write, store, **settings)


STORED: dict[str, Writer] = {
    "names of DDP and torch.compile": _stored(partial(_prefixed, "module._orig_mod.")),
    "names of PEFT, merged": _stored(partial(_prefixed, "base_model.model.")),
    "names of TRL, beside a value head": _stored(
        lambda folder, tensors: _prefixed("pretrained_model.", folder, tensors, "v_head.summary.weight")
    ),
    "names around a text model": _stored(_around_text_model),
    "shards without an index": _stored(partial(_in_shards, "model", ".safetensors")),
    "shards of .bin without an index": _stored(partial(_in_shards, "pytorch_model", ".bin")),
    "variant (model.fp16.safetensors)": _stored(partial(_in_file, "model.fp16.safetensors")),
    "one file of another name": _stored(partial(_in_file, "mine.safetensors")),
    "torch before 1.6": _stored(_by_old_torch),
    "Lightning .ckpt": _stored(_by_lightning),
    "Composer .pt": _stored(_by_composer),
    "folder pytorch_model.bin/": _stored(_in_folder_called_as_file),
    "a trainer's folder, one checkpoint": _stored(_in_trainers_folder),
    "Meta's consolidated.00.pth, 01": _stored(_by_meta, num_key_value_heads=KEY_VALUE_HEADS),
    "Meta's, embedding by rows": _stored(partial(_by_meta, embedding_dim=0)),
    "Mistral's consolidated.safetensors": _stored(_by_mistral, family="mistral", sliding_window=8),
    "torchtitan's names": _stored(_by_torchtitan),
    "verl, a file of each rank": _stored(_by_verl),
    "tied, head of other values": _write_untied,
    "tied, head of the same values": _write_with_equal_head,
    "LoRA": partial(_write_with_adapter, {}),
    "LoRA, as a model of images has it": partial(_write_with_adapter, {"init_lora_weights": "eva"}, config=_gemma3),
}
STORED_REFUSED: dict[str, tuple[Writer, str]] = {
    "names of PEFT, not merged": (_stored(_unmerged), "a model with an adapter of PEFT within it"),
    "several checkpoints": (
        _stored(partial(_in_trainers_folder, steps=(500, 1000))),
        "its folders checkpoint-500, checkpoint-1000 do: name the one to serve",
    ),
    "an adapter as the model": (
        _stored(partial(_with_adapter_settings, "adapter_model.safetensors")),
        "is an adapter of owner/base",
    ),
    "an adapter beside the model": (
        _stored(partial(_with_adapter_settings, "model.safetensors")),
        "holds an adapter of owner/base (adapter_config.json)",
    ),
    "git-lfs pointer": (_stored(_with_pointer), "is a git-lfs pointer to a file of 4,976,698,672 bytes"),
    "empty file": (_file(_SAFETENSORS), "is empty (0 bytes)"),
    "Meta's without config.json": (
        _stored(partial(_without_configuration, _by_meta)),
        "with no config.json to tell the model's sizes",
    ),
    "DeepSpeed ZeRO": (_file("global_step5/zero_pp_rank_0_mp_rank_00_optim_states.pt"), "zero_to_fp32.py"),
    "verl, a rank's file missing": (_file("model_world_size_2_rank_0.pt"), "not one of each rank"),
    "Megatron": (_file("iter_0000005/mp_rank_00/model_optim_rng.pt"), "Megatron-Bridge"),
    "Megatron torch_dist": (_stored(_by_megatron), "is a checkpoint of Megatron (common.pt)"),
    "NeMo": (_file("llama.nemo"), "a NeMo archive"),
    "Flax": (_file("flax_model.msgpack"), "from_flax=True"),
    "TensorFlow": (_file("tf_model.h5"), "from_tf=True"),
    "LoRA, PiSSA": (partial(_write_with_adapter, {"init_lora_weights": "pissa_niter_4"}), "init_lora_weights is"),
    "LoRA, activated": (
        partial(_write_with_adapter, {"alora_invocation_tokens": [5, 6]}),
        "alora_invocation_tokens is [5, 6]",
    ),
    "LoRA with an unknown key": (partial(_write_with_adapter, {"kasa_config": {"beta": 1}}), "kasa_config is"),
}
"""With what the line says."""
