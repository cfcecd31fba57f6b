"""A checkpoint folder as an index: name → dtype, shape, files and byte ranges. No weight is read, no pickle executed.

Which format a folder has it says itself: safetensors, what torch.save wrote, both whole or in shards, what
torch.distributed.checkpoint writes, or a GGUF file. The modules that are called here know the formats themselves; whose
names of tensors they find is one question for all of them (`folders/model_names.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ts_parallel.checkpoint.folders.authors import read_consolidated, with_names_of_transformers
from ts_parallel.checkpoint.folders.foreign import refuse_adapter_beside, refuse_foreign, refuse_megatron
from ts_parallel.checkpoint.folders.located import inner_checkpoints
from ts_parallel.checkpoint.folders.model_names import find_model_names
from ts_parallel.checkpoint.folders.rank_shards import rank_files, read_rank_files
from ts_parallel.checkpoint.folders.weight_files import (
    SHARD_INDEX,
    SINGLE_FILE,
    TORCH_FILE,
    TORCH_INDEX,
    MissingWeightsError,
    WeightFiles,
    find_weight_files,
)
from ts_parallel.checkpoint.formats.dcp import METADATA, read_distributed
from ts_parallel.checkpoint.formats.safetensors_files import read_distributed_safetensors, read_safetensors
from ts_parallel.checkpoint.formats.torch_files import as_saved, read_torch_tensors
from ts_parallel.checkpoint.gguf.tensors import read_gguf
from ts_parallel.checkpoint.quantized import decode_quantized
from ts_parallel.checkpoint.stored import CheckpointIndex, StoredPart, StoredTensor
from ts_parallel.errors import CheckpointError

logger = logging.getLogger(__name__)

__all__ = ["SHARD_INDEX", "SINGLE_FILE", "CheckpointIndex", "StoredPart", "StoredTensor", "read_index"]

_MOST_NAMES_SHOWN = 8


def read_index(folder: Path, settings: Path | None = None) -> CheckpointIndex:
    """The tensors of a model's folder: of safetensors, files of torch.save, a torch.distributed.checkpoint, or GGUF.
    Weights that are quantised are there as what is computed of them.

    Args:
        settings: the folder of the model's configuration, where it is neither `folder` nor the one above.

    Raises:
        CheckpointError: no such folder, no checkpoint in it or two of different kinds, a file that is missing, cut off
            or of another format, tensors of which a part is missing, a pickle that holds more than tensors, weights
            that are quantised in a way that is not read here, or an adapter beside them.
    """
    stored = with_names_of_transformers(_read_stored(folder, settings), folder, settings)
    refuse_adapter_beside(folder)
    return decode_quantized(stored, folder, settings)


def _read_stored(folder: Path, settings: Path | None) -> CheckpointIndex:
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint folder {folder}")
    if (folder / METADATA).is_file():
        own = next(
            (name for name in (SINGLE_FILE, SHARD_INDEX, TORCH_FILE, TORCH_INDEX) if (folder / name).is_file()), None
        )
        if own is not None:
            raise CheckpointError(
                f"{folder} holds two checkpoints, {own} and a torch.distributed.checkpoint ({METADATA}): "
                "move one of them to a folder of its own"
            )
        refuse_megatron(folder)
        return _by_name(read_distributed(folder, find_model_names))
    weights = find_weight_files(folder)
    return _otherwise(folder, settings) if weights is None else _read_files(weights, folder)


def _read_files(weights: WeightFiles, folder: Path) -> CheckpointIndex:
    if weights.remark:
        logger.info("%s: its weights are %s", folder, weights.remark)
    if weights.are_safetensors:
        return _named((tensor for file in weights.files for tensor in read_safetensors(file)), folder)
    return _by_name(read_torch_tensors(weights.files, find_model_names))


def read_index_if_whole(folder: Path, settings: Path | None = None) -> CheckpointIndex:
    """Empty where the folder's weights are still to be fetched: it can be planned for all the same.

    Args:
        settings: as of `read_index`.

    Raises:
        CheckpointError: they are there, and cannot be read.
    """
    try:
        return read_index(folder, settings)
    except MissingWeightsError:
        return {}


def has_plain_names(folder: Path) -> bool:
    """Whether the weights that transformers would find there have the names in its files that the index has for them.

    Raises:
        CheckpointError: they cannot be read.
    """
    weights = find_weight_files(folder)
    if weights is None:
        return True
    if weights.are_safetensors:
        saved = {tensor.name for file in weights.files for tensor in read_safetensors(file)}
    else:
        saved = {tensor.name for tensor in read_torch_tensors(weights.files, as_saved)}
    return saved >= _read_files(weights, folder).keys()


def _by_name(tensors: Iterable[StoredTensor]) -> CheckpointIndex:
    return {tensor.name: tensor for tensor in tensors}


def _named(tensors: Iterable[StoredTensor], folder: Path) -> CheckpointIndex:
    """Under the model's names, the tensors that were saved under a flat list of names."""
    saved = _by_name(tensors)
    if not saved:
        return saved
    names = find_model_names({name: (name,) for name in saved}, folder)
    return {name: saved[key] if name == key else replace(saved[key], name=name) for key, name in names.items()}


def _otherwise(folder: Path, settings: Path | None) -> CheckpointIndex:
    """Of a folder that has no files which transformers would take for weights."""
    shards = sorted(folder.glob("shard-*-model-*.safetensors"))
    if shards:
        return _named(read_distributed_safetensors(shards), folder)
    if any(folder.glob("*.distcp")):
        raise CheckpointError(f"{folder} has *.distcp files but no {METADATA}: it was not saved to the end")
    gguf = sorted(folder.glob("*.gguf"))
    if len(gguf) > 1:
        names = ", ".join(file.name for file in gguf)
        raise CheckpointError(f"{folder} holds {names}: name the one to serve, as {gguf[0]}")
    if gguf:
        return _by_name(read_gguf(gguf[0]))
    if rank_files(folder):
        return _by_name(read_rank_files(folder, find_model_names))
    if (of_authors := read_consolidated(folder, settings)) is not None:
        return _by_name(of_authors)
    refuse_foreign(folder)
    others = f"{TORCH_FILE}, {TORCH_INDEX}, {METADATA} nor *.gguf"
    raise MissingWeightsError(f"neither {SINGLE_FILE} nor {SHARD_INDEX}, {others} in {folder}{_what_is_there(folder)}")


def _what_is_there(folder: Path) -> str:
    inner = [f"{path.name}/" for path in inner_checkpoints(folder)]
    if inner:
        return f"; its folders {', '.join(inner[-_MOST_NAMES_SHOWN:])} hold weights: name one of them"
    names = sorted(f"{path.name}{'/' * path.is_dir()}" for path in folder.iterdir() if not path.name.startswith("."))
    shown = ", ".join(names[:_MOST_NAMES_SHOWN]) + ", …" * (len(names) > _MOST_NAMES_SHOWN)
    return f", which holds {shown}" if names else ""
