"""Recordings of any length are transcribed as by transformers' `generate`: tokens, times and languages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batch_worker import Worker, lone_rank
from transformers import WhisperFeatureExtractor
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin
from whisper_models import FRAMES, file_of, make_tokenizer, save_whisper, sound

from ts_parallel.serving.batch.speech.recordings import cut_at_timestamps

TASK = "automatic_speech_recognition"
ROUTE = {"url_path": "v1/audio/transcriptions"}
FORM = {**ROUTE, "Content-Type": "multipart/form-data; boundary=x"}
# A window is one second long.
RECORDINGS = [sound(seconds, seed) for seed, seconds in enumerate((0.6, 4.37, 1.0, 2.005, 7.5))]


@pytest.fixture(scope="module", autouse=True)
def rank() -> Iterator[None]:
    with lone_rank():
        yield


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("whisper")
    return folder, save_whisper(folder)


@pytest.fixture(scope="module")
def worker(whisper: tuple[Path, Any]) -> Worker:
    return Worker(TASK, whisper[0], max_audio_seconds=8)


def generated(whisper: tuple[Path, Any], samples: Any, **asked: Any) -> Any:
    """transformers' own answer for one recording, as its pipeline prepares it."""
    folder, model = whisper
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    whole = {"truncation": False, "padding": "longest"} if len(samples) > extractor.n_samples else {}
    inputs = extractor(samples, sampling_rate=16000, return_tensors="pt", **whole)
    return model.generate(inputs["input_features"], **asked)


def text_of(tokens: Any) -> str:
    return make_tokenizer().decode(tokens, skip_special_tokens=True)


def test_recordings_of_all_lengths_that_come_together_have_the_text_of_generate(worker: Worker, whisper: Any) -> None:
    """Short ones without timestamps, and languages that are found out."""
    answers = worker.ask(*({"audio": samples.tolist()} for samples in RECORDINGS))
    for samples, (status, answer) in zip(RECORDINGS, answers, strict=True):
        assert status == 200, answer
        expected = generated(whisper, samples, return_timestamps=len(samples) > 16000 + 160)
        assert answer == {"text": text_of(expected[0])}
    assert len({answer["text"] for _, answer in answers}) == len(RECORDINGS)


ASKED: list[dict[str, Any]] = [
    {},
    {"language": "de"},
    {"language": "french", "task": "translate"},
    {"max_new_tokens": 7},
    {"prompt": "as before"},
    {"prompt": "as before", "language": "en", "max_new_tokens": 9},
]


@pytest.mark.parametrize("asked", ASKED)
def test_segments_have_the_tokens_and_times_of_generate(worker: Worker, whisper: Any, asked: dict[str, Any]) -> None:
    forms = [{"audio": samples.tolist(), "response_format": "verbose_json", **asked} for samples in RECORDINGS]
    answers = worker.ask(*forms, headers=dict.fromkeys(range(5), ROUTE))
    given = dict(asked)
    if "prompt" in given:
        given["prompt_ids"] = torch.tensor(make_tokenizer().get_prompt_ids(given.pop("prompt")))
    num_segments = []
    for samples, (status, answer) in zip(RECORDINGS, answers, strict=True):
        assert status == 200, answer
        expected = generated(whisper, samples, return_timestamps=True, return_segments=True, **given)
        (segments,) = expected["segments"]
        assert [own["tokens"] for own in answer["segments"]] == [own["tokens"].tolist() for own in segments]
        times = [(float(own["start"]), float(own["end"])) for own in segments]
        np.testing.assert_allclose([(own["start"], own["end"]) for own in answer["segments"]], times)
        assert answer["text"] == text_of([token for own in answer["segments"] for token in own["tokens"]])
        assert answer["duration"] == pytest.approx(len(samples) / 16000)
        assert answer["task"] == asked.get("task", "transcribe")
        if "language" in asked:
            assert answer["language"] == {"de": "german", "en": "english"}.get(asked["language"], "french")
        num_segments.append(len(segments))
    assert max(num_segments) > 5


def test_language_is_found_out_as_transformers_finds_it(worker: Worker, whisper: Any) -> None:
    """With a prompt before, too, which it does not depend on."""
    folder, model = whisper
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    for samples in RECORDINGS[:3]:
        body = {"audio": samples.tolist(), "response_format": "verbose_json"}
        (plain, prompted) = worker.ask(body, {**body, "prompt": "something else"})
        features = extractor(samples[:16000], sampling_rate=16000, return_tensors="pt")["input_features"]
        token = int(model.detect_language(features)[0])
        name = {"<|en|>": "english", "<|de|>": "german", "<|fr|>": "french"}[make_tokenizer().decode([token])]
        assert plain[1]["language"] == prompted[1]["language"] == name


def test_answers_windows_are_cut_as_transformers_cuts_them() -> None:
    """Thousands of answers with timestamps here and there, beside its own function."""
    random, begin = np.random.default_rng(0), 100
    for _ in range(3000):
        tokens = random.integers(90, 112, random.integers(0, 9))
        tokens = np.where(random.random(len(tokens)) < 0.5, np.sort(np.maximum(tokens, begin)), random.integers(0, 99))
        frames = int(random.integers(1, FRAMES + 1))
        theirs, advance = WhisperGenerationMixin._retrieve_segment(
            seek_sequence=torch.tensor(tokens, dtype=torch.int64),
            seek_outputs=[{}],
            time_offset=torch.zeros(1, dtype=torch.float64),
            timestamp_begin=begin,
            seek_num_frames=torch.tensor([frames]),
            time_precision=0.02,
            time_precision_features=0.01,
            input_stride=2,
            prev_idx=0,
            idx=0,
            return_token_timestamps=False,
            decoder_input_ids=torch.zeros(1, 4),
        )
        pieces, ours = cut_at_timestamps(tokens.tolist(), begin, frames)
        assert ours == int(advance)
        assert [own for _, _, own in pieces] == [own["tokens"].tolist() for own in theirs]
        expected = [(float(own["start"]), float(own["end"])) for own in theirs]
        np.testing.assert_allclose([(start * 0.02, end * 0.02) for start, end, _ in pieces], expected, atol=1e-9)


def test_answer_is_written_in_every_format(worker: Worker) -> None:
    """By a form, as OpenAI's client sends it: TorchServe hands its parts over as bytes."""
    file = file_of(RECORDINGS[1], 16000, "FLAC")
    forms = [
        {"file": bytearray(file), "model": b"whisper-1", "language": b"de", "response_format": name.encode()}
        for name in ("json", "text", "verbose_json", "srt", "vtt")
    ]
    json_, text, verbose, srt, vtt = (worker.ask_form(form, FORM) for form in forms)
    segments = verbose["segments"]
    assert json_ == {"text": verbose["text"], "usage": {"type": "duration", "seconds": 5}}
    assert text == verbose["text"] + "\n"
    assert vtt.startswith("WEBVTT\n\n00:00:0") and srt.startswith("1\n00:00:0")
    assert srt.count(" --> ") == vtt.count(" --> ") == len(segments)
    assert [own["id"] for own in segments] == list(range(len(segments)))
    assert all(own["avg_logprob"] < 0 for own in segments)


BAD = [
    ({"audio": []}, "the audio is empty", "audio"),
    ({"audio": [0.0] * 128_001}, "the audio is longer than 8 s (8.0 s or more): send it in pieces", "audio"),
    ({"audio": [0.0, float("nan")]}, "no finite numbers", "audio"),
    ({"audio": "UklGR"}, "'audio' must be nested lists of numbers, got str", "audio"),
    ({}, "the body must have one of ['file', 'audio', 'input_features'], got none", "file"),
    (
        {"audio": [0.0] * 99, "response_format": "xml"},
        "must be one of ['json', 'text', 'verbose_json'",
        "response_format",
    ),
    ({"audio": [0.0] * 99, "temperature": 0.5}, "'temperature' must be 0", "temperature"),
    ({"audio": [0.0] * 99, "stream": True}, "'stream' must be false", "stream"),
    ({"audio": [0.0] * 99, "timestamp_granularities": ["word"]}, "words have no times", "timestamp_granularities"),
    ({"audio": [0.0] * 99, "prompt": "a" * 30}, "'prompt' has 32 tokens, the model takes at most 19", "prompt"),
    ({"audio": [0.0] * 99, "prompt": "<|en|>"}, "disallowed special token: <|en|>", "prompt"),
    ({"audio": [0.0] * 99, "language": "Latin"}, "one of ['de', 'en', 'fr'], got 'Latin'", "language"),
    ({"audio": [0.0] * 99, "max_new_tokens": 38}, "a number from 1 to 37, got 38", "max_new_tokens"),
    ({"input_features": [[0.0] * 801] * 8}, "input_features has 801 frames, at most 800 are taken", "input_features"),
    (b"no sound at all", "no sound file that can be read (WAV, FLAC, MP3", "file"),
]


@pytest.mark.parametrize(("body", "says", "parameter"), BAD)
def test_what_is_wrong_is_refused_alone(worker: Worker, body: Any, says: str, parameter: str) -> None:
    good = {"audio": RECORDINGS[0].tolist()}
    (first, _), (status, answer), (last, _) = worker.ask(good, body, good)
    assert (first, status, last) == (200, 400, 200), answer
    assert says in answer["error"]["message"]
    assert answer["error"]["param"] == parameter
