"""Weights under the names that their authors gave them: Meta's and Mistral's own files, and what torchtitan trains.

There the rows of queries and keys lie so that rotary pairs are neighbours; transformers has one half of each head
behind the other. Meta's larger models are in several files, of which each has a part of every weight: rows of what
Megatron calls column-parallel, columns of what it calls row-parallel. config.json is transformers' own; it says how
wide a head is.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ts_parallel.checkpoint.codes.rows import PairedRows
from ts_parallel.checkpoint.formats.boxes import check_boxes
from ts_parallel.checkpoint.formats.safetensors_files import read_safetensors
from ts_parallel.checkpoint.formats.torch_files import as_saved, read_torch_tensors
from ts_parallel.checkpoint.settings import CONFIG_FILE, files_of_authors, settings_folder
from ts_parallel.checkpoint.stored import CheckpointIndex, StoredPart, StoredTensor
from ts_parallel.errors import CheckpointError

_TELLING = ("tok_embeddings.weight", "layers.0.attention.wq.weight")
_FAMILIES = ("llama", "mistral", "mixtral")
_COMPUTED = re.compile(r"rope\.freqs|freqs_cis")
_ENDS = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_LAYER = re.compile(r"layers\.(?P<layer>\d+)\.(?P<part>.+)")
_PARTS = {
    **{f"attention.w{own}": f"self_attn.{own}_proj" for own in "qkvo"},
    **{"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    **{"feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj"},
    **{"block_sparse_moe.gate": "block_sparse_moe.gate", "feed_forward.gate": "block_sparse_moe.gate"},
}
_EXPERT = re.compile(r"(?:block_sparse_moe|feed_forward)\.experts\.(\d+)\.(w[123])")
_PAIRED = re.compile(r"layers\.\d+\.attention\.w[qk]\.weight")
_WHOLE_IN_EACH = re.compile(r"(.+_norm|norm)\.weight|rope\.freqs")
_CUT_BY_COLUMNS = re.compile(r"layers\.\d+\.(attention\.wo|feed_forward\.w2)\.weight")


@dataclass(frozen=True)
class _Sizes:
    family: str
    head: int
    """Rows of one head."""
    hidden: int


def read_consolidated(folder: Path, settings: Path | None) -> Iterable[StoredTensor] | None:
    """The tensors of `consolidated*` files; None where there are none, or no config.json that says what they are.

    Raises:
        CheckpointError: a file cannot be read, or their parts make up no tensor.
    """
    files = files_of_authors(folder)
    safetensors = [file for file in files if file.suffix == ".safetensors"]
    if not files:
        return None
    try:
        home = settings_folder(folder, settings)
    except CheckpointError:
        return None  # whoever looks at the folder next says what it is
    if safetensors:
        return (tensor for file in safetensors for tensor in read_safetensors(file))
    parts = [list(read_torch_tensors([file], as_saved)) for file in files]
    return parts[0] if len(parts) == 1 else _joined(parts, _sizes(home), folder)


def with_names_of_transformers(index: CheckpointIndex, folder: Path, settings: Path | None) -> CheckpointIndex:
    """The index under transformers' names and in its order of rows; as it is where it has other names than those.

    Raises:
        CheckpointError: the model is of another family than those whose names are known, or a tensor has no place.
    """
    if not all(name in index for name in _TELLING):
        return index
    sizes = _sizes(settings_folder(folder, settings))
    named = [_renamed(stored, sizes) for stored in index.values() if not _COMPUTED.fullmatch(stored.name)]
    return {stored.name: stored for stored in named}


def _sizes(home: Path) -> _Sizes:
    file = home / CONFIG_FILE
    try:
        content: dict[str, Any] = json.loads(file.read_bytes())
        family, hidden, heads = content["model_type"], content["hidden_size"], content["num_attention_heads"]
        sizes = _Sizes(str(family), int(content.get("head_dim") or hidden // heads), int(hidden))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, RecursionError):
        raise CheckpointError(f"{file} does not say model_type, hidden_size and num_attention_heads") from None
    if sizes.family not in _FAMILIES:
        raise CheckpointError(
            f"{file} says model_type {sizes.family!r}, and its weights have their authors' names, which are known of "
            f"{', '.join(_FAMILIES)}: serve them in transformers' format"
        )
    return sizes


def _renamed(stored: StoredTensor, sizes: _Sizes) -> StoredTensor:
    own = replace(stored, name=_name_of(stored))
    if not _PAIRED.fullmatch(stored.name):
        return own
    if len(stored.shape) != 2 or sizes.head % 2 or stored.shape[0] % sizes.head:
        raise CheckpointError(
            f"{stored.name!r} in {stored.file} has shape {list(stored.shape)}, which are no heads of {sizes.head} rows"
        )
    return replace(own, codes=PairedRows(stored, sizes.head))


def _name_of(stored: StoredTensor) -> str:
    stem, _, end = stored.name.rpartition(".")
    layer = _LAYER.fullmatch(stem)
    part = layer["part"] if layer is not None else ""
    expert = _EXPERT.fullmatch(part)
    inner = f"block_sparse_moe.experts.{expert[1]}.{expert[2]}" if expert is not None else _PARTS.get(part)
    name = f"model.layers.{layer['layer']}.{inner}" if layer is not None and inner is not None else _ENDS.get(stem)
    if name is None or end != "weight":
        raise CheckpointError(
            f"{stored.file} holds {stored.name!r}, for which no name is known here: serve the checkpoint in "
            "transformers' format"
        )
    return f"{name}.weight"


def _joined(files: Sequence[Sequence[StoredTensor]], sizes: _Sizes, folder: Path) -> Iterator[StoredTensor]:
    """Each weight of its parts in the files, in their order."""
    found: Mapping[str, list[StoredTensor]] = defaultdict(list)
    for tensors in files:
        for tensor in tensors:
            found[tensor.name].append(tensor)
    for name, own in found.items():
        first = own[0]
        if _WHOLE_IN_EACH.fullmatch(name):
            yield first
            continue
        if len(own) != len(files) or any(part.shape != first.shape or part.dtype != first.dtype for part in own):
            raise CheckpointError(
                f"{folder} has {len(files)} files, of which not each has a part of {name!r}, all alike"
            )
        dim = 1 if _is_cut_by_columns(first, sizes) else 0
        size = first.shape[dim]
        corners = [tuple(place * size if each == dim else 0 for each in range(2)) for place in range(len(own))]
        parts = tuple(
            StoredPart(part.file, corner, part.shape, part.offset, part.num_bytes)
            for part, corner in zip(own, corners, strict=True)
        )
        shape = tuple(length * (len(own) if each == dim else 1) for each, length in enumerate(first.shape))
        check_boxes(name, shape, [(part.corner, part.shape) for part in parts], folder)
        yield StoredTensor(name, first.dtype, shape, parts)


def _is_cut_by_columns(part: StoredTensor, sizes: _Sizes) -> bool:
    """Embeddings were cut by columns before Llama 3."""
    if len(part.shape) != 2:
        raise CheckpointError(f"{part.name!r} in {part.file} has shape {list(part.shape)}, and is no matrix")
    if part.name.startswith("tok_embeddings."):
        return part.shape[1] != sizes.hidden
    return _CUT_BY_COLUMNS.fullmatch(part.name) is not None
