"""Fields that clients send and this server does not have: which of them pass, and which would change the answer.

OpenAI's clients, and those of other servers, send many. What only says how a request is booked, kept or found again
passes. What would change an answer passes at the values at which it changes none, and is refused at others, for an
answer that is other than asked is worse than none. A name that nobody knows passes too, and the log names it once, but
for one that is a slip of the pen: it was meant to count.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, get_args

from ts_parallel.config import did_you_mean
from ts_parallel.errors import RequestError
from ts_parallel.serving.exchange import echo
from ts_parallel.serving.openai.fields.reading import refuse_many
from ts_parallel.serving.text.forms import StrictModel

logger = logging.getLogger(__name__)

_MOST_NAMES_TOLD = 200
_LONGEST_NAME_TOLD = 60

# Other servers' names for what is here too.
ALIASES: Mapping[str, str] = {
    "grammar": "guided_grammar",  # llama.cpp
    "json_schema": "guided_json",
    "max_new_tokens": "max_tokens",  # transformers, TGI
    "max_output_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "n_predict": "max_tokens",
    "num_return_sequences": "n",
    "random_seed": "seed",  # Mistral
    "repeat_penalty": "repetition_penalty",
    "stop_sequences": "stop",
    "typical": "typical_p",
}

# What changes no answer, whatever it says.
WITHOUT_EFFECT = frozenset(
    {
        "cache_prompt",
        "guided_decoding_backend",
        "id_slot",
        "keep_alive",
        "metadata",
        "prediction",  # which other servers are faster by, and answer the same
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "session_id",
        "store",
        "user",
        "user_id",
    }
)

# What would change the answer, with the values at which it does not. None always passes.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "beam_width": (1,),
    "cache_salt": (),  # a promise to share no cache with others
    "cfg_scale": (1,),
    "chat_template": (),
    "detokenize": (True,),
    "diversity_penalty": (0,),
    "dry_multiplier": (0,),
    "dynamic_temperature": (False,),
    "dynatemp_range": (0,),
    "early_stopping": (False,),
    "ebnf": (),
    "echo": (False,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guidance_scale": (1,),
    "guided_whitespace_pattern": (),
    "image_data": ([],),
    "include_reasoning": (True,),
    "instructions": ("",),
    "kv_transfer_params": ({},),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "lora": ([],),
    "max_length": (),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "modalities": (["text"], []),
    "n_probs": (0,),
    "negative_prompt": ("",),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "parallel_tool_calls": (True, False),
    "penalty_alpha": (0,),
    "reasoning": ({},),
    "regex": (),
    "repeat_last_n": (-1,),
    "return_hidden_states": (False,),
    "return_tokens_as_token_ids": (False,),
    "samplers": (),
    "smoothing_factor": (0,),
    "spaces_between_special_tokens": (True,),
    "structural_tag": (),
    "suffix": ("",),
    "system": ("",),
    "temperature_last": (False,),
    "tfs": (1,),
    "tfs_z": (1,),
    "tool_choice": ("none", "auto"),
    "top_a": (0,),
    "top_logprobs": (0,),
    "top_n_sigma": (0, -1),
    "truncation_side": ("left",),
    "use_beam_search": (False,),
    "watermark": (False,),
    "web_search_options": (),
    "xtc_probability": (0,),
}

# What to do instead.
_INSTEAD: Mapping[str, str] = {
    "ebnf": "use guided_grammar",
    "function_call": "use tool_choice",
    "functions": "use tools",
    "instructions": "use a message of the role system",
    "max_length": "use max_tokens",
    "n_probs": "use logprobs",
    "reasoning": "use reasoning_effort",
    "regex": "use guided_regex",
    "system": "use a message of the role system",
    "top_logprobs": "use logprobs",
}

# The same where every unknown field is refused.
_NEUTRAL_IF_STRICT = ("echo", "parallel_tool_calls", "store", "suffix", "tool_choice")


class ForeignFields:
    """What is done about them. Owns the names that the log was told."""

    def __init__(self, is_strict: bool = False) -> None:
        """
        Args:
            is_strict: whether every unknown field is refused, but for a few of OpenAI's own at neutral values.
        """
        self._is_strict = is_strict
        self._told: set[str] = set()

    def without(self, body: type[StrictModel], fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that a body has.

        Raises:
            RequestError: another one would change the answer, or is not to pass.
        """
        refuse_many(fields, "the body")
        if self._is_strict:
            return self._strictly(body, fields)
        known: dict[str, Any] = {}
        for name, value in fields.items():
            own = ALIASES.get(name, name)
            if own not in body.model_fields:
                self._pass(body, name, value)
            elif own == name:
                known[name] = self._inside(body, name, value)
            elif value is not None:
                if fields.get(own) not in (None, value):
                    raise RequestError(f"{own} and {name} are the same, and say different things", name)
                known[own] = value
        return known

    def _strictly(self, body: type[StrictModel], fields: Mapping[str, Any]) -> dict[str, Any]:
        known = {}
        for name, value in fields.items():
            if name in body.model_fields:
                known[name] = value
            elif name not in _NEUTRAL_IF_STRICT or "n" not in body.model_fields:
                raise _unknown(body, name)
            elif value not in (None, *NEUTRAL.get(name, (False,))):
                raise _unsupported(name, value)
        return known

    def _pass(self, body: type[StrictModel], name: str, value: Any) -> None:
        if value is None or name in WITHOUT_EFFECT:
            return
        if name in NEUTRAL:
            if value not in NEUTRAL[name]:
                raise _unsupported(name, value)
            return
        if did_you_mean(name, body.model_fields, is_slip=True):
            raise _unknown(body, name)
        self._tell(name)

    def _inside(self, body: type[StrictModel], name: str, value: Any) -> Any:
        """A field's object without what is null in it, or has no effect."""
        kinds = [kind for kind in get_args(body.model_fields[name].annotation) if isinstance(kind, type)]
        model = next((kind for kind in kinds if issubclass(kind, StrictModel)), None)
        if model is None or not isinstance(value, dict):
            return value
        refuse_many(value, name)
        names = {own.alias or key for key, own in model.model_fields.items()}
        others = {key: own for key, own in value.items() if key not in names}
        if name == "stream_options":
            for key in [key for key, own in others.items() if own is not None]:
                self._tell(f"{name}.{key}")
                del others[key]
        return {key: own for key, own in value.items() if key in names or others.get(key) is not None}

    def _tell(self, name: str) -> None:
        """Once for each name, and for no more than so many."""
        name = str(name)[:_LONGEST_NAME_TOLD]
        if name not in self._told and len(self._told) < _MOST_NAMES_TOLD:
            self._told.add(name)
            logger.warning("requests have the field %r, which is unknown here and was ignored (told once)", name)


def _unknown(body: type[StrictModel], name: str) -> RequestError:
    hint = did_you_mean(name, body.model_fields)
    return RequestError(f"unknown field {name!r}{hint}", str(name), "unknown_parameter")


def _unsupported(name: str, value: Any) -> RequestError:
    neutral = " or ".join(echo(own) for own in NEUTRAL.get(name, (False,)))
    instead = "; ".join(filter(None, [neutral and f"it may be {neutral}", _INSTEAD.get(name, "")]))
    return RequestError(
        f"{name!r} is not supported, got {echo(value)}{f' ({instead})' if instead else ''}",
        name,
        "unsupported_parameter",
    )
