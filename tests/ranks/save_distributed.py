"""Four ranks that save one Llama as trainers do: `save_distributed.py FOLDER`, whose `model` is its safetensors.

The model is a tree of modules with its names and no code: importing transformers takes longer than all the rest.

Written beside it: `fsdp`, every parameter in four groups of rows, with the state of an optimizer; `tp`, two ranks'
shards by rows and by columns, twice each; `safetensors`, both at once, in one safetensors file of each rank.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

BY_ROWS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
BY_COLUMNS = ("self_attn.o_proj", "mlp.down_proj")


def build_model(tensors: dict[str, torch.Tensor]) -> nn.Module:
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, last, _ = name.split(".")
        parent = root
        for word in path:
            parent.add_module(word, parent._modules.get(word) or nn.Module())
            parent = parent.get_submodule(word)
        own = (
            nn.Module()
            if tensor.ndim == 1
            else nn.Embedding(1, 1)
            if last == "embed_tokens"
            else nn.Linear(1, 1, False)
        )
        own.weight = nn.Parameter(tensor.clone())
        parent.add_module(last, own)
    return root


def layers_of(model: nn.Module) -> list[nn.Module]:
    return list(model.get_submodule("model.layers").children())


def shard_fully(model: nn.Module, mesh: DeviceMesh) -> None:
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def shard_tensors(model: nn.Module, mesh: DeviceMesh) -> None:
    for layer in layers_of(model):
        rows = {name: ColwiseParallel() for name in BY_ROWS}
        parallelize_module(layer, mesh, {**rows, **{name: RowwiseParallel() for name in BY_COLUMNS}})
    parallelize_module(model, mesh, {"model.embed_tokens": RowwiseParallel(), "lm_head": ColwiseParallel()})


def step_without_a_change(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    ranks = init_device_mesh("cpu", (4,))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    tensors = load_file(folder / "model" / "model.safetensors")
    model = build_model(tensors)
    shard_fully(model, ranks)
    optimizer = step_without_a_change(model)
    # Five rows on four ranks: the last one has none.
    own = {**get_model_state_dict(model), "five_rows": distribute_tensor(torch.arange(5.0), ranks, [Shard(0)])}
    state = {"model": own, "optim": get_optimizer_state_dict(model, optimizer), "epoch": 3}
    save(state, checkpoint_id=folder / "fsdp")

    model = build_model(tensors)
    shard_tensors(model, grid["tp"])
    save({"app": {"model": get_model_state_dict(model)}}, checkpoint_id=folder / "tp")
    shard_fully(model, grid["dp"])
    writer = HuggingFaceStorageWriter(str(folder / "safetensors"), save_distributed=True)
    save(get_model_state_dict(model), storage_writer=writer)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
