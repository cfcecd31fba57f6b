"""Greedy answers of an encoder–decoder model, token by token, as transformers' `generate` chooses them.

The rules (forced, suppressed and repeated tokens, shortest and longest answers) are those of the folder's
`generation_config.json`, applied by transformers' own processors, each item by itself. All micro-batches of a run
advance together, so that the stages are busy; an item that has ended goes on with padding until its micro-batch has.
Knows no text: prompts and answers are token ids.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, PretrainedConfig
from transformers.generation.logits_process import (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    WhisperTimeStampLogitsProcessor,
)

from ts_parallel.checkpoint.settings import CONFIG_FILE
from ts_parallel.errors import CheckpointError
from ts_parallel.partition.model.seq2seq import DECODE, ENCODE, HIDDEN, MASK, PAST, PREFILL, TOKENS

logger = logging.getLogger(__name__)

PROMPT, MOST_TOKENS, TIMED, FIRST = "prompt", "max_new_tokens", "is_timed", "first_token"
"""What an item brings beside the encoder's inputs: the first tokens of the decoder, `[N]`, and a number. Of speech also
whether its answer has timestamps; of texts the token that its answer begins with, `NO_TOKEN` where the model's rules
say it."""
DETECT, NO_TOKEN = -1, -2
"""In a prompt: the most likely language; filled up to the longest of a micro-batch. Answers are filled up likewise."""

# Keys of generation_config.json that would change greedy answers, with the values that change nothing.
_NOT_FOLLOWED: Mapping[str, tuple[Any, ...]] = {
    "guidance_scale": (None, 1, 1.0),
    "sequence_bias": (None,),
    "encoder_repetition_penalty": (None, 1, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "watermarking_config": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "stop_strings": (None,),
    # Whisper's own
    "condition_on_prev_tokens": (None, False),
    "no_speech_threshold": (None,),
}

Inputs = Mapping[str, torch.Tensor]


def read_generation_config(folder: Path, config: PretrainedConfig) -> GenerationConfig:
    """What the folder says of generation: its generation_config.json, else what config.json says.

    Raises:
        CheckpointError: it cannot be read, names no token to start with, or asks for what cannot be served.
    """
    # Of what config.json says of generation, AutoConfig keeps nothing: the file itself is read, as transformers does.
    name = "generation_config.json" if (folder / "generation_config.json").is_file() else CONFIG_FILE
    try:
        generation = GenerationConfig.from_pretrained(
            folder, name, local_files_only=True, _from_model_config=name == CONFIG_FILE
        )
    except (OSError, ValueError, TypeError) as error:
        first, *_ = str(error).splitlines()
        raise CheckpointError(f"cannot read {folder / name}: {first}") from None
    if generation.decoder_start_token_id is None:
        generation.decoder_start_token_id = getattr(config, "decoder_start_token_id", None)
    if not isinstance(generation.decoder_start_token_id, int):
        raise CheckpointError(
            f"decoder_start_token_id of {folder} is {generation.decoder_start_token_id}, not a token id"
        )
    for key, idle in _NOT_FOLLOWED.items():
        if (value := getattr(generation, key, None)) not in idle:
            raise CheckpointError(f"{key} {value!r} of {folder}'s generation cannot be served: remove it")
    if (generation.num_beams or 1) > 1:
        logger.info("%s asks for %d beams; answers are greedy", name, generation.num_beams)
    return generation


class Rules:
    """How the next token is chosen of a model's logits."""

    def __init__(self, generation: GenerationConfig) -> None:
        self._own = generation
        eos = generation.eos_token_id
        self.eos_ids = frozenset([eos] if isinstance(eos, int) else eos or [])
        languages: Mapping[str, int] = getattr(generation, "lang_to_id", None) or {}
        self._languages = sorted(languages.values())
        self.padding = generation.pad_token_id or 0

    def language(self, logits: torch.Tensor) -> int:
        """The most likely one, of logits `[V]`."""
        return self._languages[int(logits[self._languages].argmax())]

    def processors(
        self, prompt_length: int, max_length: int, is_timed: bool = False, first: int = NO_TOKEN
    ) -> LogitsProcessorList:
        """In the order in which `generate` applies them, for an answer that has `max_length` tokens with its prompt.

        Args:
            first: the token that it begins with; `NO_TOKEN`: the model's own, if it has one.
        """
        own, made = self._own, LogitsProcessorList()
        forced = own.forced_bos_token_id if first == NO_TOKEN else first
        eos = torch.tensor(sorted(self.eos_ids))
        if own.repetition_penalty not in (None, 1.0):
            made.append(RepetitionPenaltyLogitsProcessor(own.repetition_penalty))
        if own.no_repeat_ngram_size:
            made.append(NoRepeatNGramLogitsProcessor(own.no_repeat_ngram_size))
        if own.bad_words_ids is not None:
            made.append(NoBadWordsLogitsProcessor(own.bad_words_ids, eos))
        if own.min_length and self.eos_ids:
            made.append(MinLengthLogitsProcessor(own.min_length, eos))
        if own.min_new_tokens and self.eos_ids:
            made.append(MinNewTokensLengthLogitsProcessor(prompt_length, own.min_new_tokens, eos))
        if forced is not None:
            made.append(ForcedBOSTokenLogitsProcessor(forced))
        if own.forced_eos_token_id is not None:
            made.append(ForcedEOSTokenLogitsProcessor(max_length, own.forced_eos_token_id))
        if own.remove_invalid_values:
            made.append(InfNanRemoveLogitsProcessor())
        if own.suppress_tokens:
            made.append(SuppressTokensLogitsProcessor(own.suppress_tokens))
        if own.begin_suppress_tokens:
            is_after_forced = prompt_length == 1 and forced is not None
            begin = prompt_length + is_after_forced
            made.append(SuppressTokensAtBeginLogitsProcessor(own.begin_suppress_tokens, begin))
        if is_timed:
            made.append(WhisperTimeStampLogitsProcessor(own, prompt_length))
        return made


class Answer:
    """One item's tokens, the prompt's first."""

    def __init__(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        rules: Rules,
        is_timed: bool = False,
        first: int = NO_TOKEN,
    ) -> None:
        self._prompt = [token for token in prompt if token != NO_TOKEN]
        self._max_length = len(self._prompt) + max_new_tokens
        self._rules = rules
        self._processors = rules.processors(len(self._prompt), self._max_length, is_timed, first)
        self._logprobs = 0.0
        self.tokens: list[int] = []
        self.is_done = False

    def num_known(self) -> int:
        """How many tokens the prompt begins with before one that is to be found out."""
        return self._prompt.index(DETECT) if DETECT in self._prompt else len(self._prompt)

    def begin(self, length: int) -> list[int]:
        """The first `length` tokens."""
        self.tokens = self._prompt[:length]
        return self.tokens

    def next(self, logits: torch.Tensor) -> int:
        """The token after those that are there, of logits `[V]`; padding once the answer has ended."""
        if self.is_done:
            return self._rules.padding
        token = self._choose(logits.float())
        self.tokens.append(token)
        num_new = len(self.tokens) - len(self._prompt)
        ends = num_new > 0 and token in self._rules.eos_ids
        self.is_done = ends or len(self.tokens) >= self._max_length
        return token

    def _choose(self, logits: torch.Tensor) -> int:
        if len(self.tokens) < len(self._prompt):
            forced = self._prompt[len(self.tokens)]
            return self._rules.language(logits) if forced == DETECT else forced
        scores = self._processors(torch.tensor([self.tokens]), logits.unsqueeze(0))[0]
        token = int(scores.argmax())
        self._logprobs += float(scores[token] - scores.logsumexp(-1))
        return token

    @property
    def logprob(self) -> float:
        """The mean over the new tokens, of those that could have been chosen."""
        return self._logprobs / max(1, len(self.tokens) - len(self._prompt))

    def new_tokens(self) -> torch.Tensor:
        return torch.tensor(self.tokens[len(self._prompt) :], dtype=torch.int64)


@dataclass
class _MicroBatch:
    """Items that advance together. `inputs` are those of the decoder's parts that do not change."""

    number: int
    inputs: dict[str, torch.Tensor]
    answers: list[Answer]
    num_before: int = 0
    last: list[int] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return all(answer.is_done for answer in self.answers)

    def prefill(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """The inputs of the first part of the decoder."""
        self.num_before = min(answer.num_known() for answer in self.answers)
        tokens = torch.tensor([answer.begin(self.num_before) for answer in self.answers])
        return {TOKENS: tokens, HIDDEN: hidden, **self.inputs}

    def decode(self) -> dict[str, torch.Tensor]:
        """The inputs of one more step."""
        past = torch.zeros(self.num_before, dtype=torch.int64)
        self.num_before += 1
        return {TOKENS: torch.tensor(self.last).unsqueeze(1), PAST: past, **self.inputs}

    def take(self, logits: torch.Tensor) -> None:
        """`[B, V]` → a token more of each answer."""
        self.last = [answer.next(row) for answer, row in zip(self.answers, logits, strict=True)]


class Parts(Protocol):
    """What the loop needs of `runtime.batch.part_runner.PartRunner`."""

    def run(self, part: int, batches: Iterable[tuple[int, Inputs]]) -> Iterator[torch.Tensor]: ...

    def forget(self, numbers: Sequence[int]) -> None: ...


class GreedyRunner:
    """Owns the answers under way. What a `MicroBatcher` runs: micro-batches of items → their new tokens."""

    def __init__(self, parts: Parts, rules: Rules) -> None:
        self._parts = parts
        self._rules = rules
        self._numbers = count()

    def run(self, batches: Iterable[Inputs]) -> Generator[torch.Tensor, None, None]:
        """Each micro-batch's answers `[B, N]`, filled up with `NO_TOKEN`; the first comes once all have ended.

        Raises:
            EngineError: an earlier run was broken off by an error, and other ranks wait for what will not come.
        """
        for answers in self.answers(batches):
            rows = [answer.new_tokens() for answer in answers]
            yield torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=NO_TOKEN)

    def answers(self, batches: Iterable[Inputs]) -> list[list[Answer]]:
        """The same as they are, with their prompts.

        Raises:
            EngineError: as `run`.
        """
        begun: list[_MicroBatch] = []
        try:
            hidden = list(self._parts.run(ENCODE, self._encoded(batches, begun)))
            first = ((batch.number, batch.prefill(states)) for batch, states in zip(begun, hidden, strict=True))
            for batch, logits in zip(begun, self._parts.run(PREFILL, first), strict=True):
                batch.take(logits)
            del hidden
            while active := [batch for batch in begun if not batch.is_done]:
                steps = ((batch.number, batch.decode()) for batch in active)
                for batch, logits in zip(active, self._parts.run(DECODE, steps), strict=True):
                    batch.take(logits)
        finally:
            self._parts.forget([batch.number for batch in begun])
        return [batch.answers for batch in begun]

    def _encoded(self, batches: Iterable[Inputs], begun: list[_MicroBatch]) -> Iterator[tuple[int, Inputs]]:
        """What the encoder is to compute, each as soon as it is there. What becomes of it goes to `begun`."""
        for inputs in batches:
            given = dict(inputs)
            prompts, limits = given.pop(PROMPT).tolist(), given.pop(MOST_TOKENS).tolist()
            timed = given.pop(TIMED).tolist() if TIMED in given else [False] * len(prompts)
            firsts = given.pop(FIRST).tolist() if FIRST in given else [NO_TOKEN] * len(prompts)
            answers = [
                Answer(prompt, limit, self._rules, is_timed, first)
                for prompt, limit, is_timed, first in zip(prompts, limits, timed, firsts, strict=True)
            ]
            shared = {MASK: given[MASK]} if MASK in given else {}
            begun.append(_MicroBatch(next(self._numbers), shared, answers))
            yield begun[-1].number, given
