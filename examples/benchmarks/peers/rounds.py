"""What a measured process and the benchmark say to each other, and the work that all are given.

The process loads its model, answers one prompt and prints one JSON line, its introduction; after that it does one round
for each JSON line that it is sent, and prints what it took. It ends when its input does. Only the standard library is
used: a peer's environment may lack all else. Knows no model.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

PROMPT_TOKENS, OUTPUT_TOKENS, VOCABULARY = 128, 64, 16000


@dataclass(frozen=True)
class Task:
    """One round: `streams` at once, each asking `asks` times for `num_tokens` tokens."""

    streams: int
    asks: int = 1
    num_tokens: int = OUTPUT_TOKENS


@dataclass(frozen=True)
class Answer:
    """One prompt's tokens and when each was known, on `perf_counter`."""

    token_ids: Sequence[int]
    moments: Sequence[float]


class System(Protocol):
    """A loaded model. `about` has its `version`, and `load_seconds`, None where they are not known."""

    about: dict[str, Any]

    def answer(self, prompts: list[list[int]], streams: int, num_tokens: int) -> list[Answer]:
        """Greedily continue all prompts, at most `streams` at a time, each by exactly `num_tokens`; in their order."""
        ...


S = TypeVar("S", bound=System)


def make_prompts(count: int) -> list[list[int]]:
    generator = random.Random(0)
    return [[generator.randrange(10, VOCABULARY) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def batches(prompts: list[list[int]], streams: int) -> list[list[list[int]]]:
    """For systems that answer a batch as a whole: its prompts together, then those of the next."""
    return [prompts[begin : begin + streams] for begin in range(0, len(prompts), streams)]


def serve_rounds(load: Callable[[], S], close: Callable[[S], None] = lambda system: None) -> None:
    """The life of a measured process. What libraries print goes to the standard error, past the benchmark."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    system = load()
    run(system, Task(1, num_tokens=1))
    print(json.dumps(system.about), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(system, Task(**json.loads(line)))), file=replies, flush=True)
    close(system)


def run(system: System, task: Task) -> dict[str, Any]:
    """`seconds` of the whole round, `next` and `slow` of it (`gaps`), and the first answer's `token_ids`."""
    prompts = make_prompts(task.streams * task.asks)
    started = time.perf_counter()
    answers = system.answer(prompts, task.streams, task.num_tokens)
    seconds = time.perf_counter() - started
    lengths = {len(answer.token_ids) for answer in answers} | {len(answer.moments) for answer in answers}
    assert len(answers) == len(prompts) and lengths == {task.num_tokens}, f"{len(answers)} answers of {lengths} tokens"
    return {"seconds": seconds, "token_ids": list(answers[0].token_ids), **gaps(answers)}


def gaps(answers: Sequence[Answer]) -> dict[str, float]:
    """Seconds between two tokens of an answer: the median, `next`, and what 99 of 100 are within, `slow`."""
    found = sorted(
        later - earlier
        for answer in answers
        for earlier, later in zip(answer.moments, answer.moments[1:], strict=False)
    )
    if not found:
        return {}
    return {"next": found[len(found) // 2], "slow": found[min(len(found) - 1, len(found) * 99 // 100)]}
