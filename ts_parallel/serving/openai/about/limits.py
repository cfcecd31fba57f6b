"""All limits of a request, for those who run into one or want to stay below it: `GET v1/limits`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ts_parallel.config import HandlerConfig
from ts_parallel.serving.openai.fields.generation import (
    LONGEST_BAD_WORDS,
    LONGEST_STOPS,
    MOST_BAD_WORDS,
    MOST_LOGPROBS,
    MOST_STOPS,
)
from ts_parallel.serving.openai.fields.reading import MOST_FIELDS, MOST_LEVELS
from ts_parallel.serving.text.structured_output import LONGEST_FORM, MOST_CHOICES


@dataclass(frozen=True)
class Limit:
    """`most` is the last value that is served; what is beyond is answered with `status`."""

    of: str
    most: float | None
    """None: there is no limit."""
    status: int = 400
    key: str | None = None
    """Of the server's configuration, by which it is another; None: there is none."""


def limits_of(config: HandlerConfig, max_model_len: int, sizes: Mapping[str, int]) -> dict[str, Limit]:
    """By name.

    Args:
        sizes: bytes of a body and of an answer that the front end takes, by TorchServe's keys.
    """
    most_open = config.max_num_seqs + config.max_num_waiting
    limits = {
        "max_model_len": Limit("tokens of a prompt and its answer together", max_model_len, key="max_model_len"),
        "n": Limit("answers to one prompt", config.max_num_seqs, key="max_num_seqs"),
        "open_requests": Limit("answers that run or wait at once", most_open, 429, "max_num_waiting"),
        "seconds": Limit("seconds of a request", config.max_request_seconds, 504, "max_request_seconds"),
        "logprobs": Limit("likely tokens beside each of an answer's or a prompt's", MOST_LOGPROBS),
        "stop_strings": Limit("stop strings", MOST_STOPS),
        "stop_characters": Limit("characters of all stop strings together", LONGEST_STOPS),
        "bad_words": Limit("bad words", MOST_BAD_WORDS),
        "bad_words_characters": Limit("characters of all bad words together", LONGEST_BAD_WORDS),
        "form_characters": Limit("characters of an answer's form", LONGEST_FORM),
        "form_choices": Limit("choices of guided_choice", MOST_CHOICES),
        "fields": Limit("fields of a body", MOST_FIELDS),
        "levels": Limit("objects and lists in one another", MOST_LEVELS),
    }
    of_bodies = {"max_request_size": "bytes of a request's body", "max_response_size": "bytes of a whole answer"}
    return limits | {key: Limit(of_bodies[key], size, 413, key) for key, size in sizes.items()}


def limits_body(model: str, limits: Mapping[str, Limit]) -> str:
    def described(limit: Limit) -> dict[str, Any]:
        return {"most": limit.most, "of": limit.of, "status_beyond": limit.status, "key": limit.key}

    own = {name: described(limit) for name, limit in limits.items()}
    return json.dumps({"object": "limits", "model": model, "limits": own})
