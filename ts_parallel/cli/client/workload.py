"""What a load asks and when: random prompts, Poisson arrivals, or a trace file. Knows no server and no clock."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, chain, repeat
from pathlib import Path
from typing import Any

from ts_parallel.config import did_you_mean
from ts_parallel.errors import ConfigError

_TRACE_FIELDS: Mapping[str, Any] = dict.fromkeys(("arrival_seconds", "prompt_tokens", "prompt", "output_tokens"))

# Short enough that most tokenizers have each as one token; for servers that take no token ids.
_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work number night point home water room mother area money "
    "story fact month lot right study book eye job word business issue side kind head house service friend father power"
).split()


@dataclass(frozen=True)
class Ask:
    """One request of a load."""

    arrival: float  # seconds after the load's start before which it is not sent
    prompt: str | tuple[int, ...]  # text or token ids
    num_output_tokens: int
    is_random: bool = True  # the ids stand for nothing, so that words may take their place


class PromptMaker:
    """Owns the random numbers of a run's prompts, so that no two of its prompts begin alike and no prefix cache helps.

    Ids come from the upper half of the range below `vocabulary`: the lowest are often special tokens.
    """

    def __init__(self, seed: int, vocabulary: int) -> None:
        self._random = random.Random(f"prompts {seed}")
        self._ids = range(vocabulary // 2, vocabulary)

    def make(self, num_tokens: int) -> tuple[int, ...]:
        return tuple(self._random.choices(self._ids, k=num_tokens))

    def like(self, ask: Ask) -> Ask:
        """A random prompt of as many tokens, or as many as the text has words; at once."""
        length = len(ask.prompt.split()) if isinstance(ask.prompt, str) else len(ask.prompt)
        return Ask(0.0, self.make(max(1, length)), ask.num_output_tokens)


def as_words(ids: tuple[int, ...]) -> str:
    """A text of one short word for each id, the same for the same ids; about as many tokens."""
    return " ".join(_WORDS[token % len(_WORDS)] for token in ids)


def equal_asks(count: int, num_prompt_tokens: int, num_output_tokens: int, prompts: PromptMaker) -> list[Ask]:
    """Requests that are all to be sent as soon as there is a free connection."""
    return [Ask(0.0, prompts.make(num_prompt_tokens), num_output_tokens) for _ in range(count)]


def spread(asks: list[Ask], rate: float, seed: int) -> list[Ask]:
    """The same requests as a Poisson process of `rate` a second: the first at 0 s, then exponential waits."""
    generator = random.Random(f"arrivals {seed}")
    waits = (generator.expovariate(each) for each in repeat(rate, len(asks) - 1))
    return [replace(ask, arrival=moment) for ask, moment in zip(asks, accumulate(chain([0.0], waits)), strict=True)]


def read_trace(file: Path, prompts: PromptMaker) -> list[Ask]:
    """A JSON object a line, blank lines aside: `arrival_seconds`, `prompt_tokens` or `prompt`, `output_tokens`.

    Raises:
        ConfigError: the file cannot be read, holds no request, or a line is wrong; it names the line and the field.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the trace {file}: {error}") from None
    asks: list[Ask] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            ask = _ask_of_line(line, prompts)
            if asks and ask.arrival < asks[-1].arrival:
                raise ConfigError(
                    f"arrival_seconds {ask.arrival:g} is before the {asks[-1].arrival:g} of the line above"
                )
        except ConfigError as error:
            raise ConfigError(f"{file} line {number}: {error}") from None
        asks.append(ask)
    if not asks:
        raise ConfigError(f"the trace {file} holds no request")
    return asks


def _ask_of_line(line: str, prompts: PromptMaker) -> Ask:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigError("no JSON object")
    for name in fields:
        if name not in _TRACE_FIELDS:
            raise ConfigError(f"unknown field {name!r}{did_you_mean(name, _TRACE_FIELDS)}")
    if ("prompt" in fields) == ("prompt_tokens" in fields):
        raise ConfigError("needs either prompt or prompt_tokens")
    arrival, num_output_tokens = _seconds(fields, "arrival_seconds"), _count(fields, "output_tokens")
    if "prompt" in fields:
        return Ask(arrival, _prompt(fields["prompt"]), num_output_tokens, is_random=False)
    return Ask(arrival, prompts.make(_count(fields, "prompt_tokens")), num_output_tokens)


def _seconds(fields: Mapping[str, Any], name: str) -> float:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ConfigError(f"{name} must be a number of at least 0, got {json.dumps(value)}")
    return float(value)


def _count(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, got {json.dumps(value)}")
    return value


def _prompt(value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str) and value:
        return value
    is_ids = isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)
    if not is_ids or not value:
        raise ConfigError("prompt must be a text or a list of token ids, and not empty")
    return tuple(value)
