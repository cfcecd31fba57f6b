"""Which of a training job's tensors are the model's, and what the model itself calls them. Knows no file format.

A trainer saves `{"model": …, "optimizer": …}`, a wrapper such as DDP, torch.compile or PEFT puts words of its own
before or into each name, a value head stands beside the model. Neither is told from the names that one model has: only
what all of the rest share is taken away. This is the one place that says which words those are; every format's names
pass here.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from ts_parallel.errors import CheckpointError

logger = logging.getLogger(__name__)

_TRAINING_STATE = re.compile(
    r"(optim|optims|optimizer|optimizers|lr_scheduler|lr_schedulers|scheduler|schedulers|data_?loader|sampler"
    r"|train_state|trainer_state|trainer|grad_scaler|rng|rng_states?|epoch|(global_)?steps?|progress|callbacks|loops)"
    r"(_states?|_state_dicts?|_\d+)*"
)
# Words that stand for a whole model: of DDP and DeepSpeed, trainers, TRL. `model` is also what many models call a part
# of their own.
_WRAPPERS = {"app", "model", "module", "state_dict", "model_state_dict", "model_state", "pretrained_model"}
_WRAPPING_DICTS = {*_WRAPPERS, "state"}
_PEFT = ["base_model", "model"]
# What PEFT leaves within names where its adapter was not merged.
_UNMERGED = re.compile(r"base_layer|modules_to_save|original_module|lora_\w+|ia3_l|hada_\w+|oft_\w+|vera_\w+")
# These stand within names too, where single layers were wrapped; no model of transformers has them.
_INNER_WRAPPERS = {
    *("_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module"),
}
_VALUE_HEADS = {"v_head", "value_head"}
_ROOTS = {"model", "transformer", "gpt_neox", "lm_head", "embed_out", "module", "state_dict", "base_model"}
"""First words of the names that causal language models and wrappers have, and none of their parts."""


def find_model_names(paths: Mapping[str, tuple[str | int, ...]], source: Path) -> dict[str, str]:
    """Key → the model's name for it, for those of `paths` that are the model's. A path's last word is the name that the
    tensor was saved under, those before it are the dicts that it was in. What was taken away is a line in the log.

    Raises:
        CheckpointError: there are tensors of none or of several models, two of one name, or an adapter within a model.
    """
    models: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for key, path in paths.items():
        words = [str(word) for word in path]
        if any(_TRAINING_STATE.fullmatch(word) for word in words[:-1]):
            continue
        num_wrappers = 0
        while num_wrappers < len(words) - 1 and words[num_wrappers] in _WRAPPING_DICTS:
            num_wrappers += 1
        models[tuple(words[:num_wrappers])][key] = ".".join(words[num_wrappers:])
    if not models:
        raise CheckpointError(f"{source} holds no tensor of a model, only {_some(paths)}")
    # Loose tensors beside a dict that is called a model are a trainer's.
    wrapped = [wrappers for wrappers in models if wrappers] or [()]
    if len(wrapped) > 1:
        places = " and ".join(repr(".".join(wrappers)) for wrappers in sorted(wrapped))
        raise CheckpointError(f"{source} holds several models, under {places}: save the one to serve alone")
    names, taken = _without_wrappers(models[wrapped[0]], source)
    if len(set(names.values())) < len(names):
        raise CheckpointError(f"{source} holds tensors of which two have the same name in the model: {_some(names)}")
    _tell(source, taken, sorted(set(paths) - set(names)))
    return names


def drop_inner_wrappers(name: str) -> str:
    """A name without the words that wrappers of single layers put into it."""
    return ".".join(word for word in name.split(".") if word not in _INNER_WRAPPERS)


def _without_wrappers(names: Mapping[str, str], source: Path) -> tuple[dict[str, str], list[str]]:
    """The names as the model has them, and the words that were taken away."""
    words = {key: [word for word in name.split(".") if word not in _INNER_WRAPPERS] for key, name in names.items()}
    words = {key: name for key, name in words.items() if any(name)}
    within = {word for name in names.values() for word in name.split(".") if word in _INNER_WRAPPERS}
    taken = sorted(within)
    while True:
        of_model = {key: name for key, name in words.items() if not _TRAINING_STATE.fullmatch(name[0])} or words
        own = {key: name for key, name in of_model.items() if name[0] not in _VALUE_HEADS} or of_model
        prefix = _shared_wrapper(list(own.values()), beside_others=len(of_model) < len(words))
        if not prefix:
            break
        if prefix == _PEFT:
            _refuse_unmerged(own, source)
        taken.append(".".join(prefix))
        words = {key: name[len(prefix) :] for key, name in own.items()}
    return {key: ".".join(name) for key, name in own.items()}, taken


def _shared_wrapper(names: Sequence[list[str]], beside_others: bool) -> list[str]:
    """The first words of all names, where they are a wrapper's."""
    if names and all(name[:2] == _PEFT and len(name) > 2 for name in names):
        return _PEFT
    firsts = {name[0] for name in names}
    if len(firsts) > 1 or not firsts <= _WRAPPERS or any(len(name) < 2 for name in names):
        return []
    if firsts == {"model"} and not beside_others and not any(name[1] in _ROOTS for name in names):
        return []
    return list(firsts)


def _refuse_unmerged(names: Mapping[str, list[str]], source: Path) -> None:
    for key, words in names.items():
        if any(_UNMERGED.fullmatch(word) for word in words):
            raise CheckpointError(
                f"{source} holds {key!r}: a model with an adapter of PEFT within it, which does not say how the two "
                "are added; save it after merge_and_unload(), or serve its base model with the adapter's folder "
                "(adapter_path, --adapter)"
            )


def _tell(source: Path, taken: Sequence[str], left: Sequence[str]) -> None:
    if taken:
        logger.info("%s: names are read without %s", source, ", ".join(map(repr, taken)))
    if left:
        logger.info("%s: %d tensors beside the model are left alone: %s", source, len(left), _some(left))


def _some(names: Mapping[str, object] | Sequence[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(map(repr, shown)) + ", …" * (len(names) > len(shown))
