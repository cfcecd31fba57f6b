"""What goes in and comes out of encoder–decoder models: texts to texts, speech to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from ts_parallel.checkpoint.index import CheckpointIndex, read_index
from ts_parallel.checkpoint.settings import settings_folder
from ts_parallel.config import Seq2SeqConfig
from ts_parallel.errors import RequestError
from ts_parallel.partition.load import load_program
from ts_parallel.partition.model.model_config import choose_dtype, read_model_config
from ts_parallel.partition.model.seq2seq import SEQ2SEQ_TASKS, SPEECH, Seq2SeqCall, call_of_seq2seq
from ts_parallel.partition.prepared import prepare_program
from ts_parallel.partition.program import PipelinePlace, ProgramRequest, RankProgram
from ts_parallel.runtime.backends.choose import choose_backend, own_dtype
from ts_parallel.runtime.batch.part_runner import Part, PartRunner
from ts_parallel.runtime.channel import StepChannel
from ts_parallel.runtime.stage import Stage
from ts_parallel.serving.batch.answers import AnswerLimits, answer_inputs
from ts_parallel.serving.batch.greedy import (
    FIRST,
    MOST_TOKENS,
    NO_TOKEN,
    PROMPT,
    GreedyRunner,
    Parts,
    Rules,
    read_generation_config,
)
from ts_parallel.serving.batch.jobs import known_fields
from ts_parallel.serving.batch.languages import FIELDS, Languages
from ts_parallel.serving.batch.micro_batching import Collator, Inputs, Runner
from ts_parallel.serving.batch.speech import requests
from ts_parallel.serving.batch.speech.prompts import SpeechPrompts
from ts_parallel.serving.batch.speech.recordings import FEATURES, SpeechRunner
from ts_parallel.serving.batch.speech.requests import SpeechApi, SpeechModel, read_extractor
from ts_parallel.serving.batch.tasks import Task
from ts_parallel.serving.exchange import RawRequest
from ts_parallel.serving.text.model_files import read_tokenizer
from ts_parallel.topology import Topology

MOST_TOKENS_OF_TEXTS = 128
"""Of an answer to a text, where nothing else is said."""
_FIELDS = ("text", "input_ids", MOST_TOKENS, *FIELDS)


def is_seq2seq(section: Any) -> bool:
    """Whether the `handler:` section names a task of encoder–decoder models."""
    return isinstance(section, Mapping) and section.get("task") in SEQ2SEQ_TASKS


def make_seq2seq_task(config: Seq2SeqConfig, folder: Path) -> tuple[Task, Rules | SpeechRules]:
    """The task of `config` for the model in `folder`, and how its answers are chosen.

    Raises:
        CheckpointError: the folder's files do not hold what the task needs.
    """
    folder = settings_folder(folder)
    model_config = read_model_config(folder)
    call = call_of_seq2seq(
        config.task, model_config, choose_dtype(own_dtype(config.dtype, config.device), model_config)
    )
    generation = read_generation_config(folder, model_config)
    tokenizer = read_tokenizer(folder) if has_tokenizer(folder) else None
    if config.task == SPEECH:
        limits = AnswerLimits(config.max_new_tokens, generation, model_config)
        prompts = SpeechPrompts(generation, model_config)
        known = SpeechModel(call, prompts, limits, tokenizer, read_extractor(folder), config.max_audio_seconds)
        speech = SpeechApi(known)
        window = int(call.inputs[FEATURES].sizes[-1])
        task = Task(speech.preprocess, speech.answer, speech.collator(), speech.open, requests.ROUTES, requests.FIELDS)
        return task, SpeechRules(generation, window)
    limits = AnswerLimits(config.max_new_tokens or MOST_TOKENS_OF_TEXTS, generation, model_config)
    text = Text2TextInput(tokenizer, call, generation, limits, model_config.vocab_size)
    return Task(text, AnswerText(tokenizer), text.collator(), fields=_FIELDS), Rules(generation)


@dataclass(frozen=True)
class SpeechRules:
    """How answers are chosen of a model that hears `window` frames at once."""

    generation: GenerationConfig
    window: int


def answer_runner(parts: Parts, rules: Rules | SpeechRules) -> Runner:
    """What runs a task's micro-batches over a model in parts."""
    if isinstance(rules, SpeechRules):
        return SpeechRunner(GreedyRunner(parts, Rules(rules.generation)), rules.window, rules.generation)
    return GreedyRunner(parts, rules)


def make_part_runner(config: Seq2SeqConfig, folder: Path, topology: Topology) -> PartRunner:
    """This rank's stages of each part, loaded and ready to run."""
    index, group = read_index(folder), topology.tensor_parallel
    place = PipelinePlace(topology.stage, topology.num_stages, 1, config.split_points)
    request = ProgramRequest(folder, own_dtype(config.dtype, config.device), group.rank, group.size, place, config.task)
    return run_program(prepare_program(request, index), index, topology)


def run_program(program: RankProgram, index: CheckpointIndex, topology: Topology) -> PartRunner:
    """The runner of a program in parts, its weights read from the checkpoint."""
    group, count = topology.tensor_parallel, topology.num_stages
    backend = choose_backend(topology.device, program.dtype, topology.num_threads)
    tensors = load_program(program, index, group, topology.device, backend.weights).tensors
    reads = program.inputs_by_stage
    parts = [
        Part(Stage(code, tensors, group, backend), code.kept, reads[number * count : (number + 1) * count], output)
        for number, (code, output) in enumerate(zip(program.stages, program.outputs, strict=True))
    ]
    return PartRunner(parts, StepChannel(topology), topology)


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder has files of one. A folder without answers, and is asked, by token ids."""
    names = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "sentencepiece.bpe.model", "vocab.json")
    return any((folder / name).is_file() for name in names)


@dataclass(frozen=True)
class AnswerCollator(Collator):
    """An item's part of the output is as long as its own answer."""

    def split(self, output: Any, items: Sequence[Inputs]) -> list[Any]:
        return [row[row != NO_TOKEN] for row in output]


class AnswerText:
    """Token ids `[N]` → `{"text"}` without special tokens, or `{"token_ids"}` where there is no tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, output: torch.Tensor) -> dict[str, Any]:
        if self._tokenizer is None:
            return {"token_ids": output.tolist()}
        return {"text": self._tokenizer.decode(output, skip_special_tokens=True)}


class Text2TextInput:
    """A text, raw or as `{"text": …}`, or its `{"input_ids": […]}` → the encoder's inputs `[S]` and the answer's
    prompt."""

    def __init__(
        self, tokenizer: Any, call: Seq2SeqCall, generation: GenerationConfig, limits: AnswerLimits, num_tokens: int
    ) -> None:
        """
        Args:
            num_tokens: of the model's vocabulary.
        """
        self._tokenizer = tokenizer
        self._longest = min(getattr(tokenizer, "model_max_length", call.limits["S"]), call.limits["S"])
        self._prompt = [int(generation.decoder_start_token_id)]
        self._languages = Languages(tokenizer, self._prompt[0], num_tokens)
        self._padding = generation.pad_token_id or 0
        self._limits = limits
        self._num_tokens = num_tokens

    def __call__(self, item: RawRequest) -> dict[str, torch.Tensor]:
        """
        Raises:
            RequestError: the body has no text or an empty one, one of more tokens than the model takes, or a field that
                is unknown or out of its limits.
        """
        text = item.text()
        fields = known_fields(item, _FIELDS) if text is None else {"text": text}
        ids = self._token_ids(fields)
        if not ids:
            raise RequestError("the text is empty", "text")
        if len(ids) > self._longest:
            raise RequestError(f"the text has {len(ids)} tokens, the model takes at most {self._longest}", "text")
        if not all(0 <= token < self._num_tokens for token in ids):
            raise RequestError(f"the model's token ids are 0 to {self._num_tokens - 1}", "input_ids")
        prompt, first = self._languages.begin(fields, self._prompt)
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.ones(len(ids), dtype=torch.int64),
            **answer_inputs(prompt, self._limits.of(fields, prompt)),
            FIRST: torch.tensor(first),
        }

    def collator(self) -> Collator:
        """Fills shorter texts up on the right, with what the attention mask leaves out."""
        return AnswerCollator({"input_ids": self._padding, "attention_mask": 0, PROMPT: NO_TOKEN})

    def _token_ids(self, fields: Mapping[str, Any]) -> list[int]:
        ids = fields.get("input_ids")
        if ids is not None:
            if not isinstance(ids, list) or not all(type(token) is int for token in ids):
                raise RequestError("'input_ids' must be a list of token ids", "input_ids")
            return ids
        text = fields.get("text")
        if not isinstance(text, str):
            raise RequestError(f"'text' must be a text, got {type(text).__name__}", "text")
        if self._tokenizer is None:
            raise RequestError("the model's folder has no tokenizer: send 'input_ids'", "text")
        return self._languages.encode(text, fields)
