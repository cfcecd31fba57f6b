"""Speech that is written down frame by frame: the text is that of transformers' pipeline, whatever it arrives in."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from batch_worker import Worker, lone_rank
from rank_answers import BOTH, PIPELINE, answers_over_ranks
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCTC,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
    pipeline,
)

from ts_parallel.errors import PlanError
from ts_parallel.partition.model.encoder import call_of_task
from ts_parallel.partition.model.seq2seq import call_of_seq2seq

TRANSCRIPTIONS = {"url_path": "v1/audio/transcriptions"}
LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAOINSHRDLU"]
SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "pad_token_id": 0},
    **{"conv_dim": [16, 16, 16], "conv_kernel": [10, 3, 2], "conv_stride": [5, 2, 2], "vocab_size": len(LETTERS)},
    **{"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "wav2vec2": SIZES,
    "stable": {**SIZES, "do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True},
    "hubert": SIZES,
    "wavlm": SIZES,
}


@pytest.fixture(scope="module", autouse=True)
def rank() -> Iterator[None]:
    with lone_rank():
        yield


def save(folder: Path, name: str) -> Path:
    """A random model that hears many letters."""
    torch.manual_seed(1)
    model = AutoModelForCTC.from_config(CONFIG_MAPPING["wav2vec2" if name == "stable" else name](**FAMILIES[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.lm_head.weight.normal_(std=2.0)
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({letter: index for index, letter in enumerate(LETTERS)}))
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=name == "stable")
    Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def sound(number: int, num_samples: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Tones that change, and noise."""
    random = np.random.default_rng(number)
    tones = np.repeat(random.uniform(80, 3000, num_samples // 400 + 1), 400)[:num_samples]
    phase = np.cumsum(tones) / 16000 * 2 * np.pi
    samples = 0.3 * np.sin(phase) + 0.05 * random.standard_normal(num_samples)
    return samples.astype(np.float32)


def wav(samples: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, 16000, format="WAV", subtype="FLOAT")
    return file.getvalue()


SOUNDS = [sound(0, 16000), sound(1, 9123), sound(2, 16000), sound(3, 700)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("wav2vec2"), "wav2vec2")


@pytest.fixture(scope="module")
def worker(folder: Path) -> Worker:
    return Worker("ctc_speech_recognition", folder, max_audio_seconds=2)


def plainly(folder: Path, **asked: Any) -> list[dict[str, Any]]:
    heard = pipeline("automatic-speech-recognition", model=str(folder))
    return [heard(samples.copy(), **asked) for samples in SOUNDS]


def test_text_is_that_of_transformers_pipeline(worker: Worker, folder: Path) -> None:
    """Of samples, of files, and of sounds of unlike lengths that come together."""
    expected = plainly(folder)
    assert len(set(expected[0]["text"])) > 4
    samples = worker.ask(*({"audio": own.tolist()} for own in SOUNDS))
    assert samples == [(200, answer) for answer in expected]
    assert worker.ask(*map(wav, SOUNDS)) == samples


@pytest.mark.parametrize("kind", ["char", "word"])
def test_times_are_those_of_transformers_pipeline(worker: Worker, folder: Path, kind: str) -> None:
    expected = plainly(folder, return_timestamps=kind)
    answers = worker.ask(*({"audio": own.tolist(), "return_timestamps": kind} for own in SOUNDS))
    for (status, answer), wanted in zip(answers, expected, strict=True):
        assert (status, answer["text"]) == (200, wanted["text"])
        assert [own["text"] for own in answer["chunks"]] == [own["text"] for own in wanted["chunks"]]
        for ours, theirs in zip(answer["chunks"], wanted["chunks"], strict=True):
            assert ours["timestamp"] == pytest.approx(theirs["timestamp"])


def test_openais_route_takes_a_form_and_answers_in_its_shape(worker: Worker, folder: Path) -> None:
    (expected, *_) = plainly(folder)
    form = {"file": bytearray(wav(SOUNDS[0])), "model": b"m"}
    headers = {**TRANSCRIPTIONS, "Content-Type": "multipart/form-data; boundary=b"}
    assert worker.ask_form(form, headers) == {**expected, "usage": {"type": "duration", "seconds": 1}}
    assert worker.ask_form({**form, "response_format": b"text"}, headers) == expected["text"] + "\n"


BAD = [
    (b"no sound", "no sound file that can be read", "file"),
    ({"audio": []}, "the audio is empty", "audio"),
    ({"audio": [0.0] * 40}, "the audio has 40 samples, the model needs at least ", "audio"),
    ({"audio": [0.0] * 40000}, "the audio is longer than 2 s", "audio"),
    ({"audio": "UklGR"}, "'audio' must be nested lists of numbers, got str", "audio"),
    ({"audio": [[0.0]]}, "'audio' must be one list of samples, got 2 dims", "audio"),
    ({"audio": [0.0] * 900, "language": "de"}, "unknown field 'language'", "language"),
    ({"audio": [0.0] * 900, "response_format": "srt"}, "must be one of ['json', 'text'], got 'srt'", "response_format"),
    ({"audio": [0.0] * 900, "temperature": 1}, "'temperature' can only be 0, got 1", "temperature"),
    ({"model": "m"}, "the body must have one of ['file', 'audio'], got none", "file"),
]


@pytest.mark.parametrize(("body", "says", "parameter"), BAD)
def test_bad_sound_is_refused_alone(worker: Worker, body: Any, says: str, parameter: str) -> None:
    good = {"audio": SOUNDS[3].tolist()}
    (first, _), (status, answer), (last, _) = worker.ask(good, body, good)
    assert (first, status, last) == (200, 400, 200)
    assert says in answer["error"]["message"]
    assert answer["error"]["param"] == parameter


def test_shortest_sound_is_heard(worker: Worker, folder: Path) -> None:
    (refused,) = worker.ask({"audio": [0.0]})
    least = int(refused[1]["error"]["message"].split()[-1])
    shortest, shorter = worker.ask({"audio": SOUNDS[0][:least].tolist()}, {"audio": SOUNDS[0][: least - 1].tolist()})
    plain = pipeline("automatic-speech-recognition", model=str(folder))(SOUNDS[0][:least].copy())
    assert (shortest, shorter[0]) == ((200, plain), 400)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # of WavLM's own code
@pytest.mark.ranks
def test_two_ranks_and_two_stages_hear_the_same(folder: Path, tmp_path: Path) -> None:
    others = {name: save(tmp_path / name, name) for name in FAMILIES if name != "wav2vec2"}
    bodies = [{"audio": own.tolist()} for own in SOUNDS]
    shapes = {"wav2vec2": BOTH, "stable": BOTH, "hubert": [PIPELINE], "wavlm": [PIPELINE]}
    folders = {"wav2vec2": folder, **others}
    asked = {own: ("ctc_speech_recognition", bodies, shapes[name]) for name, own in folders.items()}
    for own, answers in answers_over_ranks(asked, tmp_path).items():
        expected = plainly(own)
        assert len(answers) == len(asked[own][2])
        assert answers == dict.fromkeys(answers, expected), own.name


def test_models_of_other_tasks_are_refused_with_theirs(tmp_path: Path) -> None:
    bert, wav2vec2 = CONFIG_MAPPING["bert"](), CONFIG_MAPPING["wav2vec2"](**SIZES)
    with pytest.raises(PlanError, match="serves models that hear samples, as wav2vec2 does, not 'bert'"):
        call_of_task("ctc_speech_recognition", tmp_path, bert, torch.float32)
    with pytest.raises(PlanError, match="those that hear as wav2vec2 does are of task 'ctc_speech_recognition'"):
        call_of_seq2seq("automatic_speech_recognition", wav2vec2, torch.float32)
