"""Recordings of any length, window by window, as transformers' Whisper goes through them (its sequential long form).

A window's answer says by its timestamps how far the speech in it was heard to its end; the next window begins there.
Recordings advance together, whatever their lengths, a round of the decoder for each window. F frames of features, of
which the encoder takes a window's at once and halves them. Knows no text.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ts_parallel.serving.batch.greedy import DETECT, MOST_TOKENS, NO_TOKEN, PROMPT, TIMED, Answer, GreedyRunner, Inputs
from ts_parallel.serving.batch.micro_batching import Collator

FEATURES, FRAMES, CONTEXT, MOST_IN_ALL = "input_features", "num_frames", "context", "most_new_tokens"
"""What an item brings: `[mel bins, F]`; F; the tokens before each window's prompt; how far `MOST_TOKENS` may grow."""
SECONDS_OF_TOKEN, SECONDS_OF_FRAME, FRAMES_OF_TOKEN = 0.02, 0.01, 2
_NEVER = 2**31  # of models without timestamps


@dataclass(frozen=True)
class Segment:
    """What was said between two moments."""

    start: float
    end: float
    """Seconds."""
    seek: int
    """The frame at which its window begins."""
    tokens: list[int]
    logprob: float
    """The mean over its window's tokens."""


@dataclass(frozen=True)
class Transcript:
    """What was said in a recording."""

    tokens: list[int]
    segments: tuple[Segment, ...]
    prompt: list[int]
    """The first tokens of each window, with a language that was found out."""


class SpeechCollator(Collator):
    """Fills shorter recordings up; each has its transcript."""

    def join(self, items: Sequence[Inputs]) -> dict[str, torch.Tensor]:
        longest = max(item[FEATURES].shape[-1] for item in items)
        return super().join([{**item, FEATURES: _filled(item[FEATURES], longest)} for item in items])

    def split(self, output: Any, items: Sequence[Inputs]) -> list[Any]:
        return list(output)


class Recording:
    """Owns how far one recording has been heard."""

    def __init__(self, inputs: Inputs, window: int, timestamp_begin: int, eos: Any, padding: int) -> None:
        """
        Args:
            inputs: the item's.
            window: so many frames the encoder takes.
        """
        self._features, self._num_frames = inputs[FEATURES], int(inputs[FRAMES])
        self._window, self._begin, self._eos, self._padding = window, timestamp_begin, eos, padding
        self._context = [token for token in inputs[CONTEXT].tolist() if token != NO_TOKEN]
        self._prompt = [token for token in inputs[PROMPT].tolist() if token != NO_TOKEN]
        self._most, self._most_in_all = int(inputs[MOST_TOKENS]), int(inputs[MOST_IN_ALL])
        self._is_timed = inputs[TIMED]
        self._seek = 0
        self._segments: list[Segment] = []

    @property
    def is_done(self) -> bool:
        return self._seek >= self._num_frames

    @property
    def transcript(self) -> Transcript:
        tokens = [token for segment in self._segments for token in segment.tokens]
        return Transcript(tokens, tuple(self._segments), self._prompt)

    def next_window(self) -> dict[str, torch.Tensor]:
        """The inputs of the next window's answer."""
        own = self._features[:, self._seek : min(self._seek + self._window, self._num_frames)]
        prompt, most = [*self._context, *self._prompt], self._most
        if self._has_to_detect_first:
            prompt, most = self._prompt[:2], 0
        return {
            FEATURES: _filled(own, self._window),
            PROMPT: torch.tensor(prompt),
            MOST_TOKENS: torch.tensor(most),
            TIMED: self._is_timed,
        }

    def take(self, answer: Answer) -> None:
        """What was heard in the window."""
        if self._has_to_detect_first:
            self._prompt[:2] = answer.tokens
            return
        self._prompt = answer.tokens[len(self._context) : len(self._context) + len(self._prompt)]
        tokens = self._without_end(answer.new_tokens().tolist())
        left = min(self._num_frames - self._seek, self._window)
        pieces, advance = cut_at_timestamps(tokens, self._begin, left)
        offset = self._seek * SECONDS_OF_TOKEN / FRAMES_OF_TOKEN
        self._segments += [
            Segment(offset + start * SECONDS_OF_TOKEN, offset + end * SECONDS_OF_TOKEN, self._seek, own, answer.logprob)
            for start, end, own in pieces
        ]
        self._seek += advance if advance > 0 else left  # whatever a model says, it ends
        self._most = min(self._most + len(self._context) + len(self._prompt), self._most_in_all)

    @property
    def _has_to_detect_first(self) -> bool:
        """A language is found out of the sound alone, not of a context too."""
        return bool(self._context) and DETECT in self._prompt

    def _without_end(self, tokens: list[int]) -> list[int]:
        """As transformers takes an answer's end away."""
        if tokens and tokens[-1] == self._padding:
            tokens = tokens[: len(tokens) - tokens.count(self._padding) + (self._padding == self._eos)]
        return tokens[:-1] if tokens and tokens[-1] == self._eos else tokens


def cut_at_timestamps(tokens: list[int], begin: int, num_frames: int) -> tuple[list[tuple[int, int, list[int]]], int]:
    """Start, end (in steps of a timestamp) and tokens of each segment of a window's answer, and how many frames on the
    next window begins.

    Args:
        begin: the token of the first timestamp.
        num_frames: of the recording in the window.
    """
    stamps = [token >= begin for token in tokens]
    cuts = [at + 1 for at in range(len(tokens) - 1) if stamps[at] and stamps[at + 1]]
    if not cuts:
        heard = int(torch.tensor(num_frames) * SECONDS_OF_FRAME / SECONDS_OF_TOKEN)  # rounds as there
        last = next((token for token in reversed(tokens) if token >= begin), begin)
        return [(0, last - begin if last != begin else heard, tokens)], num_frames
    ends_alone = stamps[-2:] == [False, True]  # nothing is said behind the last timestamp
    if ends_alone:
        cuts.append(len(tokens))
    else:
        cuts[-1] += 1  # the last segment keeps the stamp at which the next one would begin
    pieces = []
    for first, behind in zip([0, *cuts], cuts, strict=False):
        own = tokens[first:behind]
        end = own[-1] if behind != cuts[-1] or ends_alone else own[-2]
        pieces.append((own[0] - begin, end - begin, own))
    if ends_alone:
        return pieces, num_frames
    return pieces, (tokens[cuts[-1] - 2] - begin) * FRAMES_OF_TOKEN


class SpeechRunner:
    """What a `MicroBatcher` runs: micro-batches of recordings → their transcripts."""

    def __init__(self, greedy: GreedyRunner, window: int, generation: Any) -> None:
        self._greedy = greedy
        untimed = getattr(generation, "no_timestamps_token_id", None)
        begin = _NEVER if untimed is None else untimed + 1
        self._of_model = (window, begin, generation.eos_token_id, generation.pad_token_id or 0)

    def run(self, batches: Iterable[Inputs]) -> Generator[list[Transcript], None, None]:
        """
        Raises:
            EngineError: an earlier run was broken off by an error, and other ranks wait for what will not come.
        """
        groups = [[Recording(own, *self._of_model) for own in _items(batch)] for batch in batches]
        size = max(map(len, groups), default=1)
        while active := [own for group in groups for own in group if not own.is_done]:
            rounds = [active[first : first + size] for first in range(0, len(active), size)]
            windows = (_join([own.next_window() for own in some]) for some in rounds)
            for some, answers in zip(rounds, self._greedy.answers(windows), strict=True):
                for own, answer in zip(some, answers, strict=True):
                    own.take(answer)
        for group in groups:
            yield [own.transcript for own in group]


def _filled(features: torch.Tensor, num_frames: int) -> torch.Tensor:
    return F.pad(features, (0, num_frames - features.shape[-1]))


def _items(batch: Inputs) -> Iterator[Mapping[str, torch.Tensor]]:
    for number in range(len(batch[FEATURES])):
        yield {name: tensor[number] for name, tensor in batch.items()}


def _join(windows: Sequence[Inputs]) -> dict[str, torch.Tensor]:
    return Collator({PROMPT: NO_TOKEN}).join(windows)
