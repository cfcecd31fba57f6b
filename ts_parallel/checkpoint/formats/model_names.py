"""Which of a training job's tensors are the model's, and what the model itself calls them. Knows no file format.

A trainer saves `{"model": …, "optimizer": …}`, a wrapper such as DDP or torch.compile puts a word of its own before or
into each name. Neither is told from the names that one model has: only what all of the rest share is taken away.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from ts_parallel.errors import CheckpointError

_TRAINING_STATE = re.compile(
    r"(optim|optims|optimizer|optimizers|lr_scheduler|lr_schedulers|scheduler|schedulers|data_?loader|sampler"
    r"|train_state|trainer_state|trainer|grad_scaler|rng|rng_states?|epoch|(global_)?steps?|progress|callbacks|loops)"
    r"(_states?|_state_dicts?|_\d+)*"
)
# Words that stand for a whole model. `model` is also what many models call a part of their own.
_WRAPPERS = {"app", "model", "module", "state_dict", "model_state_dict", "model_state"}
# These stand within names too, where single layers were wrapped; no model of transformers has them.
_INNER_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
_ROOTS = {"model", "transformer", "gpt_neox", "lm_head", "embed_out", "module", "state_dict"}
"""First words of the names that causal language models and wrappers have, and none of their parts."""


def find_model_names(paths: Mapping[str, tuple[str | int, ...]], source: Path) -> dict[str, str]:
    """Key → the model's name for it, for those of `paths` that are the model's. A path's last word is the name that the
    tensor was saved under, those before it are the dicts that it was in.

    Raises:
        CheckpointError: there are tensors of none or of several models, or two of one name.
    """
    models: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for key, path in paths.items():
        words = [str(word) for word in path]
        if any(_TRAINING_STATE.fullmatch(word) for word in words[:-1]):
            continue
        num_wrappers = 0
        while num_wrappers < len(words) - 1 and words[num_wrappers] in _WRAPPERS:
            num_wrappers += 1
        models[tuple(words[:num_wrappers])][key] = ".".join(words[num_wrappers:])
    if not models:
        raise CheckpointError(f"{source} holds no tensor of a model, only {_some(paths)}")
    # Loose tensors beside a dict that is called a model are a trainer's.
    wrapped = [wrappers for wrappers in models if wrappers] or [()]
    if len(wrapped) > 1:
        places = " and ".join(repr(".".join(wrappers)) for wrappers in sorted(wrapped))
        raise CheckpointError(f"{source} holds several models, under {places}: save the one to serve alone")
    names = _without_wrappers(models[wrapped[0]])
    if len(set(names.values())) < len(names):
        raise CheckpointError(f"{source} holds tensors of which two have the same name in the model: {_some(names)}")
    return names


def _without_wrappers(names: Mapping[str, str]) -> dict[str, str]:
    words = {
        key: [word for word in name.split(".") if word not in _INNER_WRAPPERS] for key, name in names.items() if name
    }
    while True:
        own = {key: name for key, name in words.items() if not _TRAINING_STATE.fullmatch(name[0])} or words
        firsts = {name[0] for name in own.values()}
        if len(firsts) > 1 or not firsts <= _WRAPPERS or any(len(name) < 2 for name in own.values()):
            break
        beside_others = len(own) < len(words)
        if firsts == {"model"} and not beside_others and not any(name[1] in _ROOTS for name in own.values()):
            break
        words = {key: name[1:] for key, name in own.items()}
    return {key: ".".join(name) for key, name in own.items()}


def _some(names: Mapping[str, object]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(map(repr, shown)) + ", …" * (len(names) > len(shown))
