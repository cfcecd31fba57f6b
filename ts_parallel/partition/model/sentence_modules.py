"""What a folder of sentence-transformers says of the way from hidden states to one vector a text.

`modules.json` lists modules in the order in which they run: the model, a pooling, and what follows it. The model's own
files lie beside it or in a folder that it names (`0_Transformer`). Versions 2 to 6 of that library spell the pooling in
two ways. What is not understood is refused by name, and so is a module of somebody else's code. B texts, S tokens, H
numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ts_parallel.checkpoint.settings import CONFIG_FILE
from ts_parallel.errors import CheckpointError

TRANSFORMER, POOLING, NORMALIZE, DENSE, DROPOUT = "Transformer", "Pooling", "Normalize", "Dense", "Dropout"
LAYER_NORM = "LayerNorm"
_KINDS = (TRANSFORMER, POOLING, NORMALIZE, DENSE, DROPOUT, LAYER_NORM)
_MODULES, _LIBRARY = "modules.json", "sentence_transformers."
_VECTOR = "sentence_embedding"


@dataclass(frozen=True)
class HeadModule:
    """One module behind the pooling: its kind, its settings, and the folder that holds its weights."""

    kind: str
    settings: Mapping[str, Any]
    folder: Path


@dataclass(frozen=True)
class SentenceModules:
    """How hidden states become a vector."""

    poolings: tuple[str, ...] = ("mean",)
    """What each gives stands behind what the one before gave."""
    leaves_prompt_out: bool = False
    """Whether the tokens of a prompt before the text are not pooled."""
    head: tuple[HeadModule, ...] = ()

    @property
    def is_normalised_alone(self) -> bool:
        """Whether all that follows the pooling is a norm, which needs no weights."""
        return bool(self.head) and all(module.kind == NORMALIZE for module in self.head)

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`[B, S, H]` and what is to be pooled of it, `[B, S]` → `[B, H × poolings]`."""
        vectors = torch.cat([_POOLINGS[name](hidden, mask) for name in self.poolings], dim=-1)
        return F.normalize(vectors, dim=-1) if self.is_normalised_alone else vectors


def read_sentence_modules(folder: Path) -> SentenceModules:
    """As the folder's files say; the mean of the tokens where it has none.

    Raises:
        CheckpointError: a file cannot be read, or names a module, a pooling or a setting that cannot be served.
    """
    listed = read_modules(folder)
    if not listed:
        return SentenceModules()
    kinds = [kind for kind, _ in listed]
    if kinds[:2] != [TRANSFORMER, POOLING] or kinds.count(POOLING) != 1:
        raise CheckpointError(f"{folder / 'modules.json'} begins with {kinds[:2]}, not with Transformer, Pooling")
    poolings, includes_prompt = _read_pooling(listed[1][1] / "config.json")
    head = [HeadModule(kind, _settings_of(path), path) for kind, path in listed[2:] if kind != DROPOUT]
    for module in head:
        _refuse_unserved(module)
    return SentenceModules(poolings, not includes_prompt, tuple(head))


def read_modules(folder: Path) -> list[tuple[str, Path]]:
    """Kind and folder of each module that `modules.json` lists; none where there is no such file.

    Args:
        folder: that of the file, or of the model that it names.

    Raises:
        CheckpointError: it cannot be read, or names a kind that is not known, or one of another library.
    """
    folder = sentence_folder(folder)
    file = folder / _MODULES
    types = _types_of(file) if file.is_file() else []
    for kind, _ in types:
        if not kind.startswith(_LIBRARY):
            raise CheckpointError(f"{file} has a module of type {kind!r}: code of the checkpoint's own is not run")
    listed = [(kind.rpartition(".")[2], folder / path) for kind, path in types]
    for kind, _ in listed:
        if kind not in _KINDS:
            raise CheckpointError(f"{file} has a module {kind!r}, which cannot be served; {sorted(_KINDS)} can")
    return listed


def sentence_folder(folder: Path) -> Path:
    """The one of `modules.json`: `folder`, or the one above where that names `folder` as its model's."""
    above = folder.resolve().parent
    if (folder / _MODULES).is_file() or not (above / _MODULES).is_file():
        return folder
    first = ""
    with suppress(CheckpointError):  # a file of that name may be anybody's
        first = next((path for _, path in _types_of(above / _MODULES)), "")
    return above if first and (above / first).resolve() == folder.resolve() else folder


def transformer_folder(folder: Path) -> Path:
    """The one of the model's weights, configuration and tokenizer: `folder`, or the one below it that `modules.json`
    names where they do not lie beside that.

    Raises:
        CheckpointError: as `read_modules`.
    """
    if (folder / CONFIG_FILE).is_file() or not (folder / _MODULES).is_file():
        return folder
    return next((path for kind, path in read_modules(folder) if kind == TRANSFORMER), folder)


def _types_of(file: Path) -> list[tuple[str, str]]:
    """Type and path of each module."""
    modules = read_json(file)
    if not isinstance(modules, list) or not all(isinstance(own, dict) and "type" in own for own in modules):
        raise CheckpointError(f"{file} is no list of modules")
    listed = [(str(own["type"]), str(own.get("path", ""))) for own in modules]
    for _, path in listed:
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise CheckpointError(f"{file} names {path!r}, which is not a folder of its own")
    return listed


def read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from None


def _read_pooling(file: Path) -> tuple[tuple[str, ...], bool]:
    """The poolings in their order, and whether a prompt's tokens are pooled with the text's."""
    settings = read_json(file)
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file} holds no settings")
    named = settings.get("pooling_mode")
    if named is None:  # as it was before version 5.4: a yes or no for each, the order of which is the library's own
        chosen = [name for name, key in _OLD_KEYS.items() if settings.get(key) is True]
        strangers = [
            key
            for key, value in settings.items()
            if key.startswith("pooling_mode_") and value is True and key not in _OLD_KEYS.values()
        ]
        poolings = (*(chosen or ["mean"] * (not strangers)), *strangers)
    else:
        poolings = (named,) if isinstance(named, str) else tuple(named)
    if unknown := [name for name in poolings if name not in _POOLINGS]:
        raise CheckpointError(f"{file} pools by {unknown}; {sorted(_POOLINGS)} can be served")
    return poolings, settings.get("include_prompt", True) is not False


def _settings_of(path: Path) -> Mapping[str, Any]:
    """Of a module that needs none there may be no file, nor a folder."""
    file = path / "config.json"
    settings = read_json(file) if file.is_file() else {}
    return settings if isinstance(settings, dict) else {}


def _refuse_unserved(module: HeadModule) -> None:
    given = module.settings.get("module_input_name", _VECTOR), module.settings.get("module_output_name") or _VECTOR
    if given != (_VECTOR, _VECTOR):
        raise CheckpointError(f"{module.folder}: a {module.kind} of {given[0]!r} cannot be served")


def _mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (_sum(hidden, mask) / _count(mask)).to(hidden.dtype)


def _mean_by_root(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (_sum(hidden, mask) / _count(mask).sqrt()).to(hidden.dtype)


def _weighted_mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Each token by its place, the first of them by 1."""
    places = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
    return (_sum(hidden, mask * places) / _count(mask * places)).to(hidden.dtype)


def _sum(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (hidden.float() * weights.unsqueeze(-1).float()).sum(dim=1)


def _count(weights: torch.Tensor) -> torch.Tensor:
    return weights.sum(dim=1, keepdim=True).float().clamp(min=1e-9)


def _largest(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return hidden.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).amax(dim=1)


def _first(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return _at(hidden, mask.argmax(dim=1))


def _last(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    places = torch.arange(hidden.shape[1], device=hidden.device)
    return _at(hidden, (mask * places).argmax(dim=1))


def _at(hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """`[B, S, H]` at one place of each text."""
    index = places.view(-1, 1, 1).expand(-1, 1, hidden.shape[-1])
    return hidden.gather(1, index).squeeze(1)


_POOLINGS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cls": _first,
    "max": _largest,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_by_root,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
# In the order in which their vectors are joined.
_OLD_KEYS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
