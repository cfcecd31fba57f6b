"""OpenAI's own client and Jina's bodies on a real TorchServe: ranks that share every layer, or deal the layers out."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import soundfile
import torch
from batch_worker import MINILM
from deployment import MODEL_CONFIGS, served
from http_client import get, post
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, WhisperFeatureExtractor
from whisper_models import file_of, make_tokenizer, save_whisper, sound

pytestmark = pytest.mark.torchserve
TEXTS = ["A cat sits on the mat.", "Stocks fell.", "The weather is lovely today, " * 60, "x"]


def settings(name: str, task: str, **handler: Any) -> dict[str, Any]:
    own = MODEL_CONFIGS[name]
    return {**own, "handler": {**own["handler"], "task": task, **handler}}


def client_of(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/1.0/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with served(
        tmp_path_factory.mktemp("served"), settings("embedding-pp2-cpu.yaml", "text_embedding"), MINILM
    ) as server:
        yield server


def test_openais_client_has_the_vectors_of_sentence_transformers(embedder: Any) -> None:
    """It asks for base64 by itself; token ids are those that LangChain sends."""
    client, model = client_of(embedder), SentenceTransformer(str(MINILM), device="cpu", local_files_only=True)
    expected = model.encode(TEXTS)
    answer = client.embeddings.create(model="demo", input=TEXTS)
    np.testing.assert_allclose([own.embedding for own in answer.data], expected, atol=1e-5)
    assert answer.usage.prompt_tokens == sum(len(model.tokenizer(text, truncation=True)["input_ids"]) for text in TEXTS)
    plain = client.embeddings.create(model="demo", input=TEXTS[0], dimensions=8, encoding_format="float")
    eight = expected[0][:8] / np.linalg.norm(expected[0][:8])
    np.testing.assert_allclose(plain.data[0].embedding, eight, atol=1e-5)
    ids = client.embeddings.create(model="demo", input=[model.tokenizer(text)["input_ids"] for text in TEXTS[:2]])
    np.testing.assert_allclose([own.embedding for own in ids.data], expected[:2], atol=1e-5)
    with pytest.raises(openai.BadRequestError, match=r"from 1 to 384, got 999"):
        client.embeddings.create(model="demo", input="a", dimensions=999)
    assert [own.id for own in client.models.list()] == ["demo"]


def test_route_that_is_not_there_names_those_that_are(embedder: Any) -> None:
    status, text = post(f"{embedder.url}/1.0/v1/classify", {"input": "a"})
    assert status == 404
    known = "v1/embeddings, v1/rerank, v1/score, v1/models, health, openapi.json"
    assert json.loads(text)["error"]["message"] == f"no route 'v1/classify': there are {known}"
    assert get(f"{embedder.url}/1.0/health") == (200, '{"status": "ok"}')


def test_two_ranks_rank_documents_as_cross_encoder_does(tmp_path: Path) -> None:
    folder = tmp_path / "reranker"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(**sizes, max_position_embeddings=64, num_labels=1))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MINILM, model_max_length=64).save_pretrained(folder)
    with served(tmp_path, settings("vision-tp2-cpu.yaml", "text_classification"), folder) as server:
        body = {"model": "demo", "query": "lovely weather", "documents": TEXTS}
        status, text = post(f"{server.url}/1.0/v1/rerank", body)
    expected = CrossEncoder(str(folder), device="cpu", local_files_only=True).rank("lovely weather", TEXTS)
    assert status == 200, text
    results = json.loads(text)["results"]
    assert [own["index"] for own in results] == [own["corpus_id"] for own in expected]
    assert [own["relevance_score"] for own in results] == pytest.approx([own["score"] for own in expected], abs=1e-5)


def test_two_ranks_transcribe_what_openais_client_uploads(tmp_path: Path) -> None:
    """A recording of five windows in a form, as text, with times, and as a file of subtitles."""
    folder = tmp_path / "whisper"
    model = save_whisper(folder)
    samples = sound(4.6)
    upload = ("speech.flac", file_of(samples, 16000, "FLAC"))
    with served(tmp_path, settings("vision-tp2-cpu.yaml", "automatic_speech_recognition"), folder) as server:
        audio = client_of(server).audio
        timed = audio.transcriptions.create(
            model="demo",
            file=upload,
            response_format="verbose_json",
            language="de",
            timestamp_granularities=["segment"],
        )
        plain = audio.transcriptions.create(model="demo", file=upload, language="de")
        subtitles = audio.transcriptions.create(model="demo", file=upload, language="de", response_format="srt")
        flac = {"Content-Type": "audio/flac"}
        translated = post(f"{server.url}/1.0/v1/audio/translations", upload[1], flac)
        raw = post(server.url, upload[1], flac)
        with pytest.raises(openai.BadRequestError, match="no sound file that can be read"):
            audio.transcriptions.create(model="demo", file=("a.wav", b"RIFF and nothing else"))
    heard = features_of(folder, upload[1])
    expected = model.generate(heard, language="de", return_timestamps=True, return_segments=True)
    (segments,) = expected["segments"]
    assert [own.tokens for own in timed.segments or []] == [own["tokens"].tolist() for own in segments]
    times = [(float(own["start"]), float(own["end"])) for own in segments]
    np.testing.assert_allclose([(own.start, own.end) for own in timed.segments or []], times)
    text = make_tokenizer().decode(expected["sequences"][0], skip_special_tokens=True)
    assert (plain.text, timed.text, timed.language) == (text, text, "german")
    assert subtitles.count(" --> ") == len(segments)
    tokenizer = make_tokenizer()
    for (status, answer), asked in ((translated, {"task": "translate"}), (raw, {})):
        tokens = model.generate(heard, return_timestamps=True, **asked)[0]
        assert status == 200, answer
        assert json.loads(answer)["text"] == tokenizer.decode(tokens, skip_special_tokens=True)


def features_of(folder: Path, file: bytes) -> torch.Tensor:
    samples, rate = soundfile.read(io.BytesIO(file), dtype="float32")
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    made = extractor(samples, sampling_rate=rate, return_tensors="pt", truncation=False, padding="longest")
    features: torch.Tensor = made["input_features"]
    return features
