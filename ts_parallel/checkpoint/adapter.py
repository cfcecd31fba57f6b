"""A LoRA adapter as PEFT saves it, merged into each slice of a weight as soon as that was read.

weight ← weight + scale · B A, of which a rank computes the rows or columns that it keeps. Format and scale:
`adapter_config.json` of https://huggingface.co/docs/peft (LoRA, https://arxiv.org/abs/2106.09685; rank-stabilised,
https://arxiv.org/abs/2312.03732). Knows files, no model.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ts_parallel.checkpoint.formats.safetensors_files import read_safetensors
from ts_parallel.checkpoint.load import LoadItem, Slice, load_tensors
from ts_parallel.checkpoint.progress import Progress
from ts_parallel.checkpoint.quantized import PLAIN_DTYPES
from ts_parallel.checkpoint.stored import CheckpointIndex, StoredTensor
from ts_parallel.errors import CheckpointError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
# What changes more than a linear's weight, with the value that says that it does not.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
}


@dataclass(frozen=True)
class _Change:
    """Of one stored weight: `up` [outputs, r] and `down` [r, inputs]."""

    up: StoredTensor
    down: StoredTensor
    scale: float
    is_transposed: bool
    """Whether the weight is stored as [inputs, outputs], as GPT-2's are."""


class Adapter:
    """Owns what it changes, by the name under which the checkpoint stores it."""

    def __init__(self, changes: Mapping[str, _Change]) -> None:
        self._changes = changes

    def merge(self, item: LoadItem) -> None:
        """Change what `item.target` holds, once it was loaded, where the adapter changes it.

        Raises:
            CheckpointError: the adapter cannot be read.
        """
        change = self._changes.get(item.source.name)
        if change is None:
            return
        target, kept = item.target.detach(), item.kept
        if change.is_transposed:
            target = target.mT
            kept = kept and Slice(1 - kept.dim, kept.pieces)
        up = _read(change.up, kept if kept is not None and kept.dim == 0 else None)
        down = _read(change.down, kept if kept is not None and kept.dim == 1 else None)
        target.add_((up @ down * change.scale).to(target.device, target.dtype))


def read_adapter(folder: Path, index: CheckpointIndex) -> Adapter:
    """The adapter of a folder, for the weights of `index`.

    Raises:
        CheckpointError: it is no LoRA adapter of linears, or one for another model.
    """
    settings = _read_settings(folder)
    pairs: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for tensor in read_safetensors(folder / WEIGHTS_FILE):
        match = _NAME.fullmatch(tensor.name)
        if match is None:
            raise CheckpointError(
                f"{tensor.file}: {tensor.name!r} is no LoRA factor of a linear, which alone is merged"
            )
        if tensor.dtype not in PLAIN_DTYPES:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(f"{tensor.file}: {tensor.name!r} is {dtype}, not of floating point numbers")
        pairs[match["module"]][match["factor"]] = tensor
    changes: dict[str, _Change] = {}
    for module, pair in pairs.items():
        stored = _stored_weight(module, index, folder)
        changes[stored.name] = _change(module, pair, stored, settings)
    return Adapter(changes)


def _read_settings(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    for needed in (file, folder / WEIGHTS_FILE):
        if not needed.is_file():
            raise CheckpointError(f"no {needed.name} in the adapter's folder {folder}")
    try:
        settings: dict[str, Any] = json.loads(file.read_text())
        kind = settings.get("peft_type")
    except (ValueError, AttributeError, RecursionError):
        raise CheckpointError(f"{file} is no JSON object") from None
    if kind != "LORA":
        raise CheckpointError(f"{file}: peft_type is {kind!r}, only 'LORA' can be merged")
    for key, harmless in _REFUSED.items():
        if settings.get(key) not in harmless:
            raise CheckpointError(f"{file}: {key} is {settings[key]!r}, which changes more than the weights of linears")
    return settings


def _stored_weight(module: str, index: CheckpointIndex, folder: Path) -> StoredTensor:
    """That of the module, also where the checkpoint holds the base model alone, without its prefix."""
    for name in (f"{module}.weight", f"{module.partition('.')[2]}.weight"):
        if name in index:
            return index[name]
    raise CheckpointError(f"{folder / WEIGHTS_FILE} changes {module!r}, the checkpoint has no '{module}.weight'")


def _change(
    module: str, pair: Mapping[str, StoredTensor], stored: StoredTensor, settings: Mapping[str, Any]
) -> _Change:
    if len(pair) != 2:
        (factor,) = pair
        raise CheckpointError(f"{pair[factor].file} has lora_{factor} of {module!r} without the other factor")
    up, down = pair["B"], pair["A"]
    is_transposed = bool(settings.get("fan_in_fan_out"))
    shape = tuple(reversed(stored.shape)) if is_transposed else stored.shape
    rank = down.shape[0] if down.shape else 0
    if len(shape) != 2 or up.shape != (shape[0], rank) or down.shape != (rank, shape[1]):
        raise CheckpointError(
            f"{up.file}: {module!r} has factors of shapes {list(up.shape)} and {list(down.shape)}, "
            f"its weight has {list(stored.shape)}"
        )
    return _Change(up, down, _scale(module, rank, settings, up.file.parent / CONFIG_FILE), is_transposed)


def _scale(module: str, rank: int, settings: Mapping[str, Any], file: Path) -> float:
    """alpha / r, or alpha / √r where ranks are stabilised."""
    try:
        alpha = float(_of_module(module, settings.get("alpha_pattern"), settings["lora_alpha"]))
        said = int(_of_module(module, settings.get("rank_pattern"), settings["r"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: r and lora_alpha of {module!r} are no numbers: {error!r}") from None
    if said != rank:
        raise CheckpointError(f"{file}: r of {module!r} is {said}, its factors have {rank}")
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _of_module(module: str, patterns: Mapping[str, Any] | None, default: Any) -> Any:
    """A pattern is the end of a module's name, or a regular expression for it (`get_pattern_key` of PEFT)."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _read(stored: StoredTensor, kept: Slice | None) -> torch.Tensor:
    """A factor in float32, which is what PEFT multiplies half precisions in."""
    shape = list(stored.shape)
    if kept is not None:
        shape[kept.dim] = kept.length
    target = torch.empty(shape, dtype=torch.float32)
    load_tensors([LoadItem(target, stored, kept)], Progress("", is_shown=False))
    return target
