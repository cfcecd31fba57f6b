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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from ts_parallel.checkpoint.codes.compare import hold_the_same
from ts_parallel.checkpoint.folders.model_names import drop_inner_wrappers
from ts_parallel.checkpoint.formats.placeholders import refuse_placeholder
from ts_parallel.checkpoint.formats.safetensors_files import read_safetensors
from ts_parallel.checkpoint.formats.torch_files import as_saved, read_torch_tensors
from ts_parallel.checkpoint.load import LoadItem, load_tensors
from ts_parallel.checkpoint.progress import Progress
from ts_parallel.checkpoint.quantized import PLAIN_DTYPES
from ts_parallel.checkpoint.stored import CheckpointIndex, Slice, StoredTensor
from ts_parallel.errors import CheckpointError

StoredNames = Mapping[str, str | None]
"""Parameter → the stored tensor that is all of it; None where the parameter has several names."""

CONFIG_FILE, WEIGHTS_FILE, TORCH_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# PEFT's own wrapper may be left out by other programs; it writes no adapter's name, dumps of a training model do.
_NAME = re.compile(
    r"(?:(?:.+\.)?base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>\w+))?\.weight"
)
# Of a head or an embedding that has factors PEFT saves the module's own weight too.
_OWN = re.compile(r"(?:(?:.+\.)?base_model\.model\.)?(?P<module>.+)\.base_layer\.weight")
# What changes more than a linear's weight, with the value that says that it does not.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
}
_INVOCATION = "alora_invocation_tokens"
_INITIALISATION = "init_lora_weights"
# Those that leave the model's own weights as they were.
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# How an adapter was made and found, and what of it is read here. Any other key that is set may change what it means.
_KNOWN = {
    *(
        "peft_type",
        "task_type",
        "inference_mode",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
    ),
    *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
    *("megatron_config", "megatron_core", "runtime_config", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of an initialisation
}
_UNSET: tuple[Any, ...] = (None, False, [], {}, "")
# Where models of text and images have their text model; what `model` begins, others do not.
_TEXT_MODEL = re.compile(r"(^|\.)language_model(?=\.)")


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


def read_adapter(folder: Path, index: CheckpointIndex, stored_names: StoredNames | None = None) -> Adapter:
    """The adapter of a folder, for the weights of `index`.

    Args:
        stored_names: of the model's parameters; None where they are known by the names in `index` alone.

    Raises:
        CheckpointError: it is no LoRA adapter of linears, or one for another model.
    """
    settings = _read_settings(folder)
    pairs: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    adapters: dict[str, StoredTensor] = {}
    copies: dict[str, StoredTensor] = {}
    for tensor in _read_factors(folder):
        name = drop_inner_wrappers(tensor.name)
        if (own := _OWN.fullmatch(name)) is not None:
            copies[own["module"]] = tensor
            continue
        match = _NAME.fullmatch(name)
        if match is None:
            raise CheckpointError(
                f"{tensor.file}: {tensor.name!r} is no LoRA factor of a linear, which alone is merged"
            )
        if tensor.dtype not in PLAIN_DTYPES:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(f"{tensor.file}: {tensor.name!r} is {dtype}, not of floating point numbers")
        adapters.setdefault(match["adapter"] or "", tensor)
        pairs[match["module"]][match["factor"]] = tensor
    if len(adapters) > 1:
        names = " and ".join(repr(tensor.name) for tensor in list(adapters.values())[:2])
        raise CheckpointError(f"{folder} holds several adapters, of which are {names}: save the one to serve alone")
    find = _Finder(index, stored_names, folder)
    changes: dict[str, _Change] = {}
    for module, pair in pairs.items():
        stored = find.weight(module)
        changes[stored.name] = _change(module, pair, stored, settings)
    for module, copy in copies.items():
        _check_copy(copy, find.weight(module))
    return Adapter(changes)


def _check_copy(copy: StoredTensor, stored: StoredTensor) -> None:
    if not hold_the_same(copy, stored, copy.dtype):
        raise CheckpointError(
            f"{copy.file} holds {copy.name!r} with other values than {stored.name!r} in {stored.file} has: it was "
            "trained on another model, or changed that; serve the merged model"
        )


def _weights_file(folder: Path) -> Path:
    files = (folder / WEIGHTS_FILE, folder / TORCH_FILE)
    return next((file for file in files if file.is_file()), files[0])


def _read_factors(folder: Path) -> Iterable[StoredTensor]:
    file = _weights_file(folder)
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    return read_torch_tensors([file], as_saved)


def _read_settings(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    for needed in (file, _weights_file(folder)):
        if not needed.is_file():
            raise CheckpointError(f"no {needed.name} in the adapter's folder {folder}")
    refuse_placeholder(file)
    try:
        settings: dict[str, Any] = json.loads(file.read_text())
        kind = settings.get("peft_type")
    except (ValueError, AttributeError, RecursionError):
        raise CheckpointError(f"{file} is no JSON object") from None
    if kind != "LORA":
        raise CheckpointError(f"{file}: peft_type is {kind!r}, only 'LORA' can be merged")
    _check_settings(settings, file)
    return settings


def _check_settings(settings: Mapping[str, Any], file: Path) -> None:
    for key, harmless in _REFUSED.items():
        if settings.get(key) not in harmless:
            raise CheckpointError(f"{file}: {key} is {settings[key]!r}, which changes more than the weights of linears")
    if settings.get(_INVOCATION):
        raise CheckpointError(
            f"{file}: {_INVOCATION} is {settings[_INVOCATION]!r}: the adapter begins to count at those tokens, and one "
            "that is merged counts everywhere"
        )
    if (way := settings.get(_INITIALISATION)) not in _PLAIN_INITIALISATIONS:
        raise CheckpointError(
            f"{file}: {_INITIALISATION} is {way!r}, by which PEFT takes the adapter's first values out of the model's "
            "own weights when it loads them: save it as a plain one (save_pretrained with "
            "path_initial_model_for_weight_conversion), or serve the merged model"
        )
    for key, value in settings.items():
        if key not in {*_REFUSED, *_KNOWN, _INVOCATION, _INITIALISATION} and value not in _UNSET:
            raise CheckpointError(
                f"{file}: {key} is {shorten(repr(value), 60)}, and what it does to the weights is not known here: "
                "serve the merged model"
            )


class _Finder:
    """Finds the stored weight of a module that PEFT names. Owns the names that it looks among."""

    def __init__(self, index: CheckpointIndex, stored_names: StoredNames | None, folder: Path) -> None:
        self._index, self._stored_names = index, stored_names or {}
        self._file = _weights_file(folder)
        self._by_core: dict[str, list[str]] = defaultdict(list)
        for name in self._stored_names:
            self._by_core[_core(name)].append(name)

    def weight(self, module: str) -> StoredTensor:
        """That of the module in the model that is served; of an older or a newer class of it; or in the checkpoint,
        also where that holds the base model alone, without its prefix.

        Raises:
            CheckpointError: there is none, several could be meant, or it is another module's too.
        """
        name = f"{module}.weight"
        known = [name] if name in self._stored_names else self._by_core[_core(name)]
        if len(known) == 1:
            stored = self._stored_names[known[0]]
            if stored is None:
                raise CheckpointError(
                    f"{self._file} changes {module!r}, which shares its weight with another module, and that would be "
                    "changed with it: serve the merged model"
                )
            return self._index[stored]
        for stored_name in (name, name.partition(".")[2]):
            if stored_name in self._index:
                return self._index[stored_name]
        raise CheckpointError(f"{self._file} changes {module!r}, the checkpoint has no '{module}.weight'")


def _core(name: str) -> str:
    """A parameter's name without the modules around the text model, which classes of one model have or have not."""
    core = _TEXT_MODEL.sub("", name, count=1).lstrip(".")
    while core.startswith("model."):
        core = core.removeprefix("model.")
    return core


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
