"""What goes in and comes out of encoder–decoder models: texts to texts, speech to text."""

from __future__ import annotations

import io
import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoFeatureExtractor, GenerationConfig, PretrainedConfig
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from ts_parallel.checkpoint.index import CheckpointIndex, read_index
from ts_parallel.checkpoint.settings import settings_folder
from ts_parallel.config import Seq2SeqConfig, did_you_mean
from ts_parallel.errors import CheckpointError, RequestError
from ts_parallel.partition.load import load_program
from ts_parallel.partition.model.model_config import choose_dtype, read_model_config
from ts_parallel.partition.model.seq2seq import SEQ2SEQ_TASKS, SPEECH, Seq2SeqCall, call_of_seq2seq, longest_answer
from ts_parallel.partition.prepared import prepare_program
from ts_parallel.partition.program import PipelinePlace, ProgramRequest, RankProgram
from ts_parallel.runtime.backends.choose import choose_backend, own_dtype
from ts_parallel.runtime.batch.part_runner import Part, PartRunner
from ts_parallel.runtime.channel import StepChannel
from ts_parallel.runtime.stage import Stage
from ts_parallel.serving.batch.greedy import DETECT, MOST_TOKENS, NO_TOKEN, PROMPT, Rules, read_generation_config
from ts_parallel.serving.batch.micro_batching import Collator, Inputs
from ts_parallel.serving.batch.tasks import Task
from ts_parallel.serving.exchange import RawRequest
from ts_parallel.serving.text.model_files import read_tokenizer
from ts_parallel.topology import Topology

SAMPLE_RATE = 16000
_SAMPLE_BYTES = 2


def is_seq2seq(section: Any) -> bool:
    """Whether the `handler:` section names a task of encoder–decoder models."""
    return isinstance(section, Mapping) and section.get("task") in SEQ2SEQ_TASKS


def make_seq2seq_task(config: Seq2SeqConfig, folder: Path) -> tuple[Task, Rules]:
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
    limits = AnswerLimits(config.max_new_tokens, generation, model_config)
    if config.task == SPEECH:
        speech = SpeechInput(folder, call, SpeechPrompts(generation, model_config), limits)
        return Task(speech, AnswerText(tokenizer), AnswerCollator({PROMPT: NO_TOKEN})), Rules(generation)
    text = Text2TextInput(tokenizer, call, generation, limits, model_config.vocab_size)
    return Task(text, AnswerText(tokenizer), text.collator()), Rules(generation)


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

    def split(self, output: torch.Tensor, items: Sequence[Inputs]) -> list[torch.Tensor]:
        return [row[row != NO_TOKEN] for row in output]


class AnswerText:
    """Token ids `[N]` → `{"text"}` without special tokens, or `{"token_ids"}` where there is no tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, output: torch.Tensor) -> dict[str, Any]:
        if self._tokenizer is None:
            return {"token_ids": output.tolist()}
        return {"text": self._tokenizer.decode(output, skip_special_tokens=True)}


class AnswerLimits:
    """The most tokens of an answer: the request's, at most the deployment's and what the decoder has positions for."""

    def __init__(self, most: int, generation: GenerationConfig, config: PretrainedConfig) -> None:
        self._most = most
        self._positions = longest_answer(config)
        self._generation = generation

    def of(self, fields: Mapping[str, Any], prompt: Sequence[int]) -> int:
        """
        Raises:
            RequestError: the request asks for more, or for no number of tokens.
        """
        limit = min(self._most, self._positions - len(prompt))
        wanted = fields.get(MOST_TOKENS)
        if wanted is None:
            own = self._generation
            usual = own.max_new_tokens or (own.max_length and own.max_length - len(prompt)) or limit
            return max(1, min(limit, usual))
        if not isinstance(wanted, int) or isinstance(wanted, bool) or not 1 <= wanted <= limit:
            raise RequestError(f"{MOST_TOKENS!r} must be a number from 1 to {limit}, got {wanted!r}", MOST_TOKENS)
        return wanted


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
        fields = _known(item.fields() if text is None else {"text": text}, ("text", "input_ids", MOST_TOKENS))
        ids = self._token_ids(fields)
        if not ids:
            raise RequestError("the text is empty", "text")
        if len(ids) > self._longest:
            raise RequestError(f"the text has {len(ids)} tokens, the model takes at most {self._longest}", "text")
        if not all(0 <= token < self._num_tokens for token in ids):
            raise RequestError(f"the model's token ids are 0 to {self._num_tokens - 1}", "input_ids")
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.ones(len(ids), dtype=torch.int64),
            **_answer_inputs(self._prompt, self._limits.of(fields, self._prompt)),
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
        encoded: list[int] = self._tokenizer(text)["input_ids"]
        return encoded


class SpeechPrompts:
    """Whisper's first tokens of an answer without timestamps, as its own `generate` makes them."""

    def __init__(self, generation: GenerationConfig, config: PretrainedConfig) -> None:
        self._own = generation
        self._languages: Mapping[str, int] = getattr(generation, "lang_to_id", None) or {}
        self._tasks: Mapping[str, int] = getattr(generation, "task_to_id", None) or {}
        forced = getattr(generation, "forced_decoder_ids", None) or getattr(config, "forced_decoder_ids", None)
        self._forced = dict(forced or [])

    def of(self, fields: Mapping[str, Any]) -> list[int]:
        """With `DETECT` in place of a language that is to be found out.

        Raises:
            RequestError: the language or the task is none of the model's.
        """
        language = fields.get("language", getattr(self._own, "language", None))
        task = fields.get("task", getattr(self._own, "task", None))
        tokens: list[int | None] = [self._own.decoder_start_token_id]
        if language is None and task is None:
            while len(tokens) in self._forced:
                tokens.append(self._forced[len(tokens)])
        if language is not None:
            tokens.append(self._language(language))
        elif self._languages and tokens[1:2] in ([], [None]):
            tokens[1:2] = [DETECT]
        if task is not None:
            tokens.append(self._task(task))
        elif language is not None and "transcribe" in self._tasks:
            tokens.append(self._tasks["transcribe"])
        untimed = getattr(self._own, "no_timestamps_token_id", None)
        if untimed is not None and tokens[-1] != untimed:
            tokens.append(untimed)
        return [token for token in tokens if token is not None]

    def _language(self, name: Any) -> int:
        text = str(name).lower()
        known = (text, f"<|{text}|>", f"<|{TO_LANGUAGE_CODE.get(text)}|>")
        token = next((self._languages[word] for word in known if word in self._languages), None)
        if token is None:
            names = sorted(word.strip("<|>") for word in self._languages)
            raise RequestError(f"'language' must be one of {names}, got {name!r}", "language")
        return token

    def _task(self, name: Any) -> int:
        if not isinstance(name, str) or name not in self._tasks:
            raise RequestError(f"'task' must be one of {sorted(self._tasks)}, got {name!r}", "task")
        return self._tasks[name]


class SpeechInput:
    """A WAV file's bytes, `{"audio": [samples at 16 kHz]}` or `{"input_features": [[…]]}` ready for the model →
    `input_features` `[mel bins, frames]` and the answer's prompt."""

    def __init__(self, folder: Path, call: Seq2SeqCall, prompts: SpeechPrompts, limits: AnswerLimits) -> None:
        spec = call.inputs["input_features"]
        self._shape, self._dtype = list(spec.sizes[1:]), spec.dtype
        self._extractor = _read_extractor(folder) if (folder / "preprocessor_config.json").is_file() else None
        self._prompts, self._limits = prompts, limits

    def __call__(self, item: RawRequest) -> dict[str, torch.Tensor]:
        """
        Raises:
            RequestError: the body has no speech, one that is too long, or a field that is unknown or out of its limits.
        """
        if isinstance(item.body, (bytes, bytearray)) and bytes(item.body[:4]) == b"RIFF":
            fields: Mapping[str, Any] = {}
            features = self._extract(_samples_of_wav(bytes(item.body)))
        else:
            names = ("audio", "input_features", "language", "task", MOST_TOKENS)
            fields = _known(item.fields(), names)
            features = self._features(fields)
        if list(features.shape) != self._shape:
            raise RequestError(
                f"input_features has shape {list(features.shape)}, the model takes {self._shape}", "input_features"
            )
        prompt = self._prompts.of(fields)
        return {
            "input_features": features.to(self._dtype),
            **_answer_inputs(prompt, self._limits.of(fields, prompt)),
        }

    def _features(self, fields: Mapping[str, Any]) -> torch.Tensor:
        if "input_features" in fields:
            return _numbers(fields["input_features"], "input_features")
        samples = _numbers(fields.get("audio"), "audio")
        if samples.dim() != 1:
            raise RequestError(f"'audio' must be one list of samples, got {samples.dim()} dims", "audio")
        return self._extract(samples.numpy())

    def _extract(self, samples: np.ndarray[Any, np.dtype[np.float32]]) -> torch.Tensor:
        if self._extractor is None:
            raise RequestError("the model's folder has no preprocessor_config.json: send 'input_features'", "audio")
        longest = self._extractor.n_samples
        if not 0 < len(samples) <= longest:
            raise RequestError(f"the audio has {len(samples)} samples, the model takes 1 to {longest}", "audio")
        made = self._extractor(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        features: torch.Tensor = made["input_features"][0]
        return features


def _read_extractor(folder: Path) -> Any:
    try:
        extractor = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no usable feature extractor in {folder}: {str(error).splitlines()[0]}") from None
    if extractor.sampling_rate != SAMPLE_RATE:
        raise CheckpointError(
            f"the feature extractor of {folder} takes {extractor.sampling_rate} Hz, not {SAMPLE_RATE}"
        )
    return extractor


def _samples_of_wav(file: bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    try:
        with wave.open(io.BytesIO(file)) as sound:
            shape = (sound.getnchannels(), sound.getsampwidth(), sound.getframerate())
            frames = sound.readframes(sound.getnframes())
    except (wave.Error, EOFError) as error:
        raise RequestError(f"the body is no WAV file that can be read: {error}") from None
    if shape != (1, _SAMPLE_BYTES, SAMPLE_RATE):
        raise RequestError(
            f"the WAV file has {shape[0]} channels of {8 * shape[1]} bits at {shape[2]} Hz; it must have 1 of "
            f"{8 * _SAMPLE_BYTES} bits at {SAMPLE_RATE} Hz"
        )
    return np.frombuffer(frames, dtype="<i2").astype(np.float32) / np.float32(2**15)


def _answer_inputs(prompt: Sequence[int], max_new_tokens: int) -> dict[str, torch.Tensor]:
    return {PROMPT: torch.tensor(prompt), MOST_TOKENS: torch.tensor(max_new_tokens)}


def _known(fields: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """
    Raises:
        RequestError: there is a field of another name.
    """
    for unknown in fields.keys() - set(names):
        raise RequestError(f"unknown field {unknown!r}{did_you_mean(unknown, dict.fromkeys(names))}", str(unknown))
    return fields


def _numbers(value: Any, name: str) -> torch.Tensor:
    if not isinstance(value, list):
        raise RequestError(f"{name!r} must be nested lists of numbers, got {type(value).__name__}", name)
    try:
        return torch.tensor(value, dtype=torch.float32)
    except (ValueError, TypeError, RuntimeError) as error:
        raise RequestError(f"{name!r} must be nested lists of numbers: {error}", name) from None
