"""What a request for speech brings: a sound file, samples or features, and how it is to be heard and written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoFeatureExtractor

from ts_parallel.errors import CheckpointError, RequestError
from ts_parallel.partition.model.seq2seq import Seq2SeqCall
from ts_parallel.serving.batch.answers import AnswerLimits, answer_inputs, numbers_field
from ts_parallel.serving.batch.greedy import MOST_TOKENS, NO_TOKEN, PROMPT, TIMED
from ts_parallel.serving.batch.jobs import Done, Work, choice, known_names
from ts_parallel.serving.batch.speech.audio import SAMPLE_RATE, checked_samples, read_audio
from ts_parallel.serving.batch.speech.prompts import SpeechPrompts
from ts_parallel.serving.batch.speech.recordings import (
    CONTEXT,
    FEATURES,
    FRAMES,
    MOST_IN_ALL,
    SECONDS_OF_FRAME,
    SpeechCollator,
)
from ts_parallel.serving.batch.speech.transcripts import FORMATS, TIMED_FORMATS, Writer
from ts_parallel.serving.exchange import RawRequest, echo

TRANSCRIPTIONS, TRANSLATIONS = "v1/audio/transcriptions", "v1/audio/translations"
_SOUNDS = ("file", "audio", FEATURES)
_GRANULARITIES = "timestamp_granularities"
FIELDS = (
    *_SOUNDS,
    *("language", "task", MOST_TOKENS, "prompt", "response_format", _GRANULARITIES, f"{_GRANULARITIES}[]"),
    *("model", "temperature", "stream", "chunking_strategy", "user"),
)
ROUTES: Mapping[str, Sequence[str]] = {TRANSCRIPTIONS: FIELDS, TRANSLATIONS: FIELDS}
_NUMBERS = (MOST_TOKENS, "temperature")


@dataclass(frozen=True)
class SpeechModel:
    """What is known of the model."""

    call: Seq2SeqCall
    prompts: SpeechPrompts
    limits: AnswerLimits
    tokenizer: Any
    """None where the folder has none."""
    extractor: Any
    """Of features; None where the folder has none."""
    most_seconds: float
    """Of a recording."""


class SpeechApi:
    """A sound file's bytes, a form with one, or JSON → a transcript."""

    def __init__(self, model: SpeechModel) -> None:
        spec = model.call.inputs[FEATURES]
        self._mel_bins, self._window = (int(size) for size in spec.sizes[1:])
        self._dtype = spec.dtype
        self._model = model

    def open(self, item: RawRequest) -> Work:
        """
        Raises:
            RequestError: the body has a field that is unknown or out of its limits.
        """
        fields = _fields_of(item)
        form = choice(fields, "response_format", FORMATS)
        if self._model.tokenizer is None and (form != "json" or item.route):
            raise RequestError("the model's folder has no tokenizer: its answers are token ids", "response_format")

        def finish(done: Sequence[Done]) -> Any:
            (own,) = done
            prompts, transcript = self._model.prompts, own.output
            if form == "json" and not item.route:
                return self.answer(transcript)
            language, task = prompts.language_of(transcript.prompt), prompts.task_of(transcript.prompt)
            seconds = float(own.inputs[_SECONDS])
            return Writer(self._decode).write(transcript, form, task, language, seconds)

        return Work([lambda: self._inputs(fields, form in TIMED_FORMATS)], finish)

    def preprocess(self, item: RawRequest) -> dict[str, torch.Tensor]:
        """
        Raises:
            RequestError: the body has no speech, one that is too long, or a field that is unknown or out of its limits.
        """
        return self._inputs(_fields_of(item), False)

    def answer(self, transcript: Any) -> dict[str, Any]:
        """`{"text"}` without special tokens, or `{"token_ids"}` where there is no tokenizer."""
        if self._model.tokenizer is None:
            return {"token_ids": transcript.tokens}
        return {"text": self._decode(transcript.tokens)}

    def collator(self) -> SpeechCollator:
        return SpeechCollator({PROMPT: NO_TOKEN, CONTEXT: NO_TOKEN})

    def _inputs(self, fields: Mapping[str, Any], wants_times: bool) -> dict[str, torch.Tensor]:
        features, seconds = self._features(fields)
        num_frames = features.shape[-1]
        is_long = num_frames > self._window
        prompts = self._model.prompts
        is_timed = wants_times or is_long or prompts.is_timed
        if is_timed and not prompts.can_be_timed:
            reason = (
                f"the audio has {seconds:.1f} s, more than a window" if is_long else "response_format asks for times"
            )
            raise RequestError(f"{reason}, and the model's generation_config.json names no timestamps", "audio")
        prompt, context = prompts.of(fields, is_timed), self._context(fields)
        most, most_in_all = self._model.limits.of_windows(fields, [*context, *prompt])
        return {
            FEATURES: features.to(self._dtype),
            FRAMES: torch.tensor(num_frames),
            **answer_inputs(prompt, most),
            MOST_IN_ALL: torch.tensor(most_in_all),
            CONTEXT: torch.tensor(context, dtype=torch.int64),
            TIMED: torch.tensor(is_timed),
            _SECONDS: torch.tensor(seconds, dtype=torch.float64),
        }

    def _features(self, fields: Mapping[str, Any]) -> tuple[torch.Tensor, float]:
        """`[mel bins, F]`, and how many seconds they are of."""
        given = [name for name in _SOUNDS if name in fields]
        if len(given) != 1:
            raise RequestError(f"the body must have one of {list(_SOUNDS)}, got {given or 'none'}", "file")
        if given == [FEATURES]:
            features = numbers_field(fields[FEATURES], FEATURES)
            seconds = features.shape[-1] * SECONDS_OF_FRAME if features.dim() else 0.0
        else:
            samples = samples_of(fields, self._model.most_seconds)
            features, seconds = self._extract(samples), len(samples) / SAMPLE_RATE
        if features.dim() != 2 or features.shape[0] != self._mel_bins or features.shape[1] < self._window:
            raise RequestError(
                f"input_features has shape {list(features.shape)}, the model takes "
                f"[{self._mel_bins}, {self._window}] or more frames",
                FEATURES,
            )
        most = int(self._model.most_seconds / SECONDS_OF_FRAME)
        if features.shape[1] > max(most, self._window):
            raise RequestError(f"input_features has {features.shape[1]} frames, at most {most} are taken", FEATURES)
        return features, seconds

    def _extract(self, samples: np.ndarray[Any, np.dtype[np.float32]]) -> torch.Tensor:
        extractor = self._model.extractor
        if extractor is None:
            raise RequestError("the model's folder has no preprocessor_config.json: send 'input_features'", "audio")
        whole = {"truncation": False, "padding": "longest"} if len(samples) > extractor.n_samples else {}
        made = extractor(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt", **whole)
        features: torch.Tensor = made[FEATURES][0]
        return features

    def _context(self, fields: Mapping[str, Any]) -> list[int]:
        """The tokens of a text that stands before each window."""
        text, tokenizer = fields.get("prompt", ""), self._model.tokenizer
        if not isinstance(text, str):
            raise RequestError(f"'prompt' must be a text, got {echo(text)}", "prompt")
        if not text:
            return []
        if not hasattr(tokenizer, "get_prompt_ids"):
            raise RequestError("the model's folder has no tokenizer of Whisper, which a prompt needs", "prompt")
        try:
            tokens: list[int] = tokenizer.get_prompt_ids(text).tolist()
        except ValueError as error:
            raise RequestError(f"'prompt': {error}", "prompt") from None
        if len(tokens) > self._model.limits.longest_context:
            most = self._model.limits.longest_context
            raise RequestError(f"'prompt' has {len(tokens)} tokens, the model takes at most {most}", "prompt")
        return tokens

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._model.tokenizer.decode(tokens, skip_special_tokens=True)
        return text


_SECONDS = "seconds"


def samples_of(fields: Mapping[str, Any], most_seconds: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Of a `file` or of `audio`.

    Raises:
        RequestError: it is none, or too long.
    """
    if "file" in fields:
        if not isinstance(fields["file"], bytes):
            raise RequestError(f"'file' must be a file's bytes, in a form, got {echo(fields['file'])}", "file")
        return read_audio(fields["file"], most_seconds)
    samples = numbers_field(fields["audio"], "audio")
    if samples.dim() != 1:
        raise RequestError(f"'audio' must be one list of samples, got {samples.dim()} dims", "audio")
    return checked_samples(samples.numpy(), most_seconds, "audio")


def read_extractor(folder: Path) -> Any:
    """None where the folder has none.

    Raises:
        CheckpointError: it cannot be used.
    """
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return None
    try:
        extractor = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no usable feature extractor in {folder}: {str(error).splitlines()[0]}") from None
    if extractor.sampling_rate != SAMPLE_RATE:
        raise CheckpointError(
            f"the feature extractor of {folder} takes {extractor.sampling_rate} Hz, not {SAMPLE_RATE}"
        )
    return extractor


def _fields_of(item: RawRequest) -> dict[str, Any]:
    """The body's fields, of whichever of its three kinds it is.

    Raises:
        RequestError: one is unknown, or has a value that cannot be had.
    """
    if isinstance(item.body, (bytes, bytearray)) and is_sound(bytes(item.body[:64]), item.content_type):
        return _of_route({"file": bytes(item.body)}, item.route)
    fields = item.fields()
    if "multipart/" in item.content_type:
        fields = {name: form_value(name, value) for name, value in fields.items()}
    fields = known_names({name: value for name, value in fields.items() if value is not None}, FIELDS)
    if fields.get("temperature", 0) != 0:
        raise RequestError(
            f"'temperature' must be 0: answers are greedy, got {echo(fields['temperature'])}", "temperature"
        )
    if fields.get("stream", False) not in (False, "false", ""):
        raise RequestError("'stream' must be false: a transcript comes when it is whole", "stream")
    if fields.get("chunking_strategy", "auto") != "auto":
        raise RequestError("'chunking_strategy' must be 'auto'", "chunking_strategy")
    wanted = fields.get(_GRANULARITIES, fields.get(f"{_GRANULARITIES}[]", "segment"))
    for own in wanted if isinstance(wanted, list) else [wanted]:
        if own != "segment":
            raise RequestError(
                f"{_GRANULARITIES!r} can be 'segment', got {echo(own)}: words have no times", _GRANULARITIES
            )
    return _of_route(fields, item.route)


def is_sound(begin: bytes, content_type: str) -> bool:
    """Whether a body is a file, and no JSON that could not be parsed; a WAV file says it whatever it was called."""
    return begin.startswith(b"RIFF") or not ("json" in content_type or begin.lstrip().startswith(b"{"))


def _of_route(fields: dict[str, Any], route: str) -> dict[str, Any]:
    return {**fields, "task": fields.get("task", "translate")} if route == TRANSLATIONS else fields


def form_value(name: str, value: Any) -> Any:
    """A form has bytes alone."""
    if name == "file" or not isinstance(value, (bytes, bytearray)):
        return bytes(value) if isinstance(value, bytearray) else value
    try:
        text = bytes(value).decode()
        number = float(text) if name in _NUMBERS else 0.0
    except ValueError:
        raise RequestError(f"{name!r} cannot be read, got {echo(bytes(value))}", name) from None
    return text if name not in _NUMBERS else int(number) if number.is_integer() else number
