"""Texts and images through batch inference, beside plain transformers: handler alone, and under a real TorchServe."""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from batch_worker import MINILM, Context, Worker, lone_rank
from deployment import MODEL_CONFIGS, ask_at_once, is_batch, is_healthy, log_end, num_ready, served, wait_until
from http_client import get, post
from PIL import Image
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    pipeline,
)

from ts_parallel.cli.server.torchserve import TorchServe
from ts_parallel.errors import CheckpointError, ConfigError, RequestError
from ts_parallel.runtime.batch.batch_runner import BatchRunner
from ts_parallel.serving import batch_inference
from ts_parallel.serving.batch.tasks import make_task
from ts_parallel.serving.batch.texts.classification import Labels
from ts_parallel.serving.batch_inference import BatchInferenceHandler, refuse_continuous_batching
from ts_parallel.serving.exchange import RawRequest
from ts_parallel.serving.torchserve.front_end_settings import MessageSizes
from ts_parallel.serving.torchserve.streaming import ResponseStream

TEXTS = ["A cat sits on the mat.", "Stocks fell.", "The weather is lovely today, and it was yesterday too.", "x"]


def reference_embeddings(texts: Sequence[str]) -> torch.Tensor:
    """Plain transformers, one text at a time, pooled and normalised as the model's card says."""
    tokenizer, model = AutoTokenizer.from_pretrained(MINILM), AutoModel.from_pretrained(MINILM).eval()
    rows = []
    for text in texts:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        rows.append(torch.nn.functional.normalize(hidden.mean(dim=0), dim=0))
    return torch.stack(rows)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight classifier of 7 labels for images of 32 × 24 pixels."""
    folder = tmp_path_factory.mktemp("vit")
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    labels = {index: f"animal {index}" for index in range(7)}
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=(32, 24), patch_size=8, id2label=labels))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 24}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight classifier of 3 labels for texts, with MiniLM's tokenizer."""
    folder = tmp_path_factory.mktemp("reviews")
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    labels = {0: "bad", 1: "fair", 2: "good"}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**sizes, max_position_embeddings=40, id2label=labels))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MINILM).save_pretrained(folder)
    return folder


def picture(seed: int, size: tuple[int, int] = (50, 40)) -> bytes:
    """A PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module", autouse=True)
def rank() -> Iterator[None]:
    with lone_rank():
        yield


@pytest.fixture(scope="module")
def embedder() -> Worker:
    return Worker("text_embedding", MINILM)


def test_texts_become_the_vectors_of_plain_transformers(embedder: Worker) -> None:
    """Raw or as JSON, in micro-batches of unlike lengths."""
    answers = embedder.ask({"text": TEXTS[0]}, TEXTS[1].encode(), bytearray(TEXTS[2].encode()), {"text": TEXTS[3]})
    assert [status for status, _ in answers] == [200] * 4
    vectors = torch.tensor([vector for _, vector in answers])
    torch.testing.assert_close(vectors, reference_embeddings(TEXTS), rtol=0, atol=1e-5)


BAD_TEXTS = [
    ({"text": 5}, "'text' must be a text, got int", "text"),
    ({"texts": "a"}, "unknown field 'texts': did you mean 'text'?", "texts"),
    ({}, "'text' must be a text, got NoneType", "text"),
    ({"text": "a", "text_pair": 5}, "'text_pair' must be a text, got int", "text_pair"),
    (b'{"text": ', "not JSON", None),
    (b"\xff\xfe", "UTF-8", None),
    (None, "must be a JSON object", None),
    ([1, 2], "must be a JSON object", None),
]


@pytest.mark.parametrize(("body", "says", "parameter"), BAD_TEXTS)
def test_bad_text_is_refused_alone(embedder: Worker, body: Any, says: str, parameter: str | None) -> None:
    good = {"text": TEXTS[0]}
    (first, _), (status, answer), (last, _) = embedder.ask(good, body, good)
    assert (first, status, last) == (200, 400, 200)
    assert says in answer["error"]["message"]
    assert (answer["error"]["type"], answer["error"]["param"]) == ("invalid_request_error", parameter)


def test_text_with_a_token_that_the_model_has_not_is_refused_alone(reviews: Path, tmp_path: Path) -> None:
    folder = tmp_path / "reviews"
    shutil.copytree(reviews, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    good = {"text": "a film"}
    (first, _), (status, answer), (last, _) = Worker("text_classification", folder).ask(good, b"a <extra>", good)
    assert (first, status, last) == (200, 400, 200)
    says = "token id 30522 ('<extra>') at position 2 of text is outside the model's vocabulary of 30522"
    assert (answer["error"]["message"], answer["error"]["param"]) == (says, "text")


def test_health_is_answered_beside_items_and_other_routes_are_not(embedder: Worker) -> None:
    routes = {1: {"url_path": "health"}, 2: {"url_path": "/v1/completions"}}
    (first, _), health, (status, answer), (last, _) = embedder.ask(
        {"text": "a"}, None, {"text": "a"}, {"text": "b"}, headers=routes
    )
    assert (first, last) == (200, 200)
    assert health == (200, {"status": "ok"})
    assert status == 404
    assert "v1/completions" in answer["error"]["message"]


def test_inference_that_fails_is_500_for_its_batch_and_the_next_is_answered(
    embedder: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(BatchRunner, "_compute", lambda *_: 1 / 0)
        answers = embedder.ask({"text": "a"}, {"text": 5}, None, headers={2: {"url_path": "health"}})
    assert [status for status, _ in answers[::2]] == [500, 200]
    assert answers[1][0] in (400, 500)  # it may have been refused before
    assert "division by zero" in answers[0][1]["error"]["message"]
    assert embedder.ask({"text": "a"})[0][0] == 200


def test_ranks_that_are_out_of_step_end_without_an_answer(embedder: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchServe would take an answer for one of the worker that it starts instead."""

    class Ended(BaseException):
        pass

    def end() -> None:
        raise Ended

    monkeypatch.setattr("ts_parallel.serving.batch_inference.exit_now", end)
    monkeypatch.setattr(embedder.handler._runner._leader, "is_broken", True)
    with pytest.raises(Ended):
        embedder.ask({"text": "a"})


def test_rank_that_follows_answers_nothing_at_once() -> None:
    assert BatchInferenceHandler().handle([{"body": b"x"}, {"body": b"y"}], Context()) == ["", ""]


def test_encoder_answers_with_a_vector_for_each_token_of_its_own() -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(MINILM), AutoModel.from_pretrained(MINILM).eval()
    answers = Worker("encoder", MINILM).ask(*({"text": text} for text in TEXTS[:2]))
    for text, (status, rows) in zip(TEXTS, answers, strict=False):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        assert status == 200
        torch.testing.assert_close(torch.tensor(rows), expected, rtol=1e-4, atol=1e-5)


def test_answer_that_is_too_large_is_refused_alone_in_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_inference, "message_sizes", lambda: MessageSizes(max_response_size=100_000))
    (fits, rows), (too_large, error), (again, _) = Worker("encoder", MINILM).ask(
        {"text": "short"}, {"text": "many words " * 50}, {"text": "short"}
    )
    assert (fits, too_large, again) == (200, 413, 200)
    assert len(rows) == 3 and "max_response_size" in error["error"]["message"]


def test_text_that_is_too_long_is_cut_where_it_is_asked_for(reviews: Path) -> None:
    """And refused elsewhere: the folder says nothing of it."""
    text = "a film that is not good " * 9
    refused, cut = Worker("text_classification", reviews).ask(
        {"text": text}, {"text": text, "truncate_prompt_tokens": -1}
    )
    says = "the text has 56 tokens, the model takes at most 40; truncate_prompt_tokens -1 cuts it"
    assert (refused[0], refused[1]["error"]["message"]) == (400, says)
    expected = pipeline("text-classification", model=str(reviews), top_k=None)([text], truncation=True, max_length=40)
    assert_same_labels([cut], expected)


def test_texts_are_labelled_as_by_transformers_pipeline(reviews: Path) -> None:
    expected = pipeline("text-classification", model=str(reviews), top_k=None)(TEXTS)
    answers = Worker("text_classification", reviews).ask(*({"text": text} for text in TEXTS))
    assert_same_labels(answers, expected)


@pytest.fixture(scope="module")
def classifier(vit: Path) -> Worker:
    return Worker("image_classification", vit)


def test_images_are_labelled_as_by_transformers_pipeline(classifier: Worker, vit: Path) -> None:
    files = [picture(seed, size) for seed, size in enumerate([(50, 40), (24, 32), (7, 90)])]
    plain = pipeline("image-classification", model=str(vit), image_processor=ViTImageProcessorPil.from_pretrained(vit))
    expected = [plain(Image.open(io.BytesIO(file))) for file in files]
    assert_same_labels(classifier.ask(*files), expected)


def assert_same_labels(answers: Sequence[tuple[int, Any]], expected: Sequence[Any]) -> None:
    for (status, ours), theirs in zip(answers, expected, strict=True):
        assert status == 200
        assert [entry["label"] for entry in ours] == [entry["label"] for entry in theirs]
        assert [entry["score"] for entry in ours] == pytest.approx([entry["score"] for entry in theirs], abs=1e-5)


def test_pixels_that_are_ready_for_the_model_are_taken_as_they_are(classifier: Worker, vit: Path) -> None:
    processor = ViTImageProcessorPil.from_pretrained(vit)
    pixels = processor(images=Image.open(io.BytesIO(picture(1))), return_tensors="pt")["pixel_values"][0]
    from_file, from_json = classifier.ask(picture(1), {"pixel_values": pixels.tolist()})
    assert_same_labels([from_file], [from_json[1]])


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"no image", "no image that can be read"),
        (b"", "no image that can be read"),
        (picture(0)[:-200], "no image that can be read"),
        ({"pixel_values": [[1.0]]}, "shape [1, 1], the model takes [3, 32, 24]"),
        ({"pixel_values": [[[1.0, "a"]]]}, "nested lists of numbers"),
        ({"pixel_values": [[1.0], [1.0, 2.0]]}, "nested lists of numbers"),
        ({"pixel_values": "AAAA"}, "nested lists of numbers, got str"),
        ({"pixels": []}, "unknown field 'pixels'"),
    ],
)
def test_bad_image_is_refused_alone(classifier: Worker, body: Any, says: str) -> None:
    (first, _), (status, answer), (last, _) = classifier.ask(picture(2), body, picture(3))
    assert (first, status, last) == (200, 400, 200)
    assert says in answer["error"]["message"]


@pytest.mark.parametrize(
    ("settings", "logits", "scores"),
    [
        ({}, [0.0, 1.0], [0.7310586, 0.2689414]),
        ({"problem_type": "multi_label_classification"}, [0.0, 1.0], [0.7310586, 0.5]),
        ({"num_labels": 1}, [1.0], [0.7310586]),
        ({"problem_type": "regression", "num_labels": 1}, [3.5], [3.5]),
    ],
)
def test_labels_are_scored_as_the_problem_wants_it(
    settings: dict[str, Any], logits: list[float], scores: list[float]
) -> None:
    answer = Labels(BertConfig(**settings))(torch.tensor(logits))
    assert [entry["score"] for entry in answer] == pytest.approx(scores)


class Stars(BatchInferenceHandler):
    """A user's own pre- and postprocessing, as the docstring of BatchInferenceHandler shows."""

    def preprocess(self, item: RawRequest) -> dict[str, torch.Tensor]:
        review = item.fields().get("review")
        if review == "fail":
            raise LookupError("no luck")
        if not isinstance(review, str):
            raise RequestError("'review' must be a text", "review")
        return super().preprocess(replace(item, body={"text": review}))

    def postprocess(self, output: torch.Tensor) -> Any:
        return {"stars": 1 + int(output.argmax()), "logits": output.tolist() if output[0] < 1e9 else float("nan")}


def test_users_own_methods_take_the_place_of_the_tasks(reviews: Path) -> None:
    stars = Worker("text_classification", reviews, Stars())
    good, refused, failed = stars.ask({"review": "a"}, {"review": 5}, {"review": "fail"})
    best = max(range(3), key=good[1]["logits"].__getitem__)
    assert (good[0], good[1]["stars"]) == (200, 1 + best)
    assert (refused[0], refused[1]["error"]["message"]) == (400, "'review' must be a text")
    assert (failed[0], failed[1]["error"]["message"]) == (500, "LookupError: no luck")


class Pieces(BatchInferenceHandler):
    """Sends each number of a text's logits by itself."""

    def respond(self, output: torch.Tensor, stream: ResponseStream) -> None:
        for number in output.tolist():
            stream.send(f"{number:.3f} ")
            while stream.has_news():
                time.sleep(0.001)


def test_handler_may_answer_in_pieces(reviews: Path, sent_pieces: list[tuple[dict[int, str], dict[int, str]]]) -> None:
    worker = Worker("text_classification", reviews, Pieces())
    context = Context(request_ids={0: "a", 1: "b", 2: "c"})
    ends = worker.handler.handle([{"body": {"text": "a"}}, {"body": {"text": 5}}, {"body": {"text": "b"}}], context)
    assert len(sent_pieces) >= 3
    assert {index for pieces, _ in sent_pieces for index in pieces} == {0, 2}
    for index in (0, 2):
        text = "".join(pieces.get(index, "") for pieces, _ in sent_pieces) + ends[index]
        assert len([float(number) for number in text.split()]) == 3
    assert [context.statuses[index][0] for index in range(3)] == [200, 400, 200]


def test_continuous_batching_is_refused_with_the_keys_to_set() -> None:
    refuse_continuous_batching({"batchSize": 8})
    with pytest.raises(ConfigError, match=r"'continuousBatching': .* which batchSize and maxBatchDelay make"):
        refuse_continuous_batching({"continuousBatching": True})


def test_folder_without_what_the_task_needs_is_said(tmp_path: Path, vit: Path, reviews: Path) -> None:
    for folder, task, says in ((vit, "image_classification", "image processor"), (reviews, "encoder", "tokenizer")):
        copy = tmp_path / task
        copy.mkdir()
        (copy / "config.json").write_bytes((folder / "config.json").read_bytes())
        with pytest.raises(CheckpointError, match=f"no usable {says} in"):
            make_task(task, copy, "float32")


def test_every_model_config_of_batch_inference_is_started_below() -> None:
    names = {name for name, settings in MODEL_CONFIGS.items() if is_batch(settings)}
    assert names == {"embedding-pp2-cpu.yaml", "vision-tp2-cpu.yaml"}


@pytest.fixture(scope="module")
def embedding_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    settings = MODEL_CONFIGS["embedding-pp2-cpu.yaml"]
    settings = {**settings, "handler": settings["handler"] | {"max_step_seconds": 10.0}}
    with served(tmp_path_factory.mktemp("embedding"), settings, MINILM) as server:
        yield server


@pytest.mark.torchserve
def test_64_requests_at_once_are_each_embedded_as_plainly(embedding_server: TorchServe) -> None:
    """Texts of many lengths over two stages: every answer is that of its own request."""
    texts = [" ".join([text] * (1 + number % 5)) + f" {number}" for number in range(16) for text in TEXTS]
    answers = ask_at_once(embedding_server, [{"text": text} for text in texts])
    assert [status for status, _ in answers] == [200] * 64
    vectors = torch.tensor([vector for _, vector in answers])
    torch.testing.assert_close(vectors, reference_embeddings(texts), rtol=0, atol=1e-5)


@pytest.mark.torchserve
def test_bad_request_is_refused_alone_among_those_beside_it(embedding_server: TorchServe) -> None:
    texts = [f"{text} beside it" for text in TEXTS]
    bodies: list[Any] = [{"text": text} for text in texts]
    bodies[2:2] = [{"text": 5}, {"input": ["a", ""], "add_special_tokens": False}, b'{"text": ']
    first, second, integer, empty, cut_off, third, fourth = ask_at_once(embedding_server, bodies)
    assert [status for status, _ in (integer, empty, cut_off)] == [400] * 3
    assert integer[1]["error"]["message"] == "'text' must be a text, got int"
    assert empty[1]["error"]["message"] == "input[1]: the text is empty"
    assert "not JSON" in cut_off[1]["error"]["message"]
    assert [status for status, _ in (first, second, third, fourth)] == [200] * 4
    vectors = torch.tensor([vector for _, vector in (first, second, third, fourth)])
    torch.testing.assert_close(vectors, reference_embeddings(texts), rtol=0, atol=1e-5)


@pytest.mark.torchserve
def test_rank_that_is_lost_ends_in_a_restart(embedding_server: TorchServe) -> None:
    """Whoever asks meanwhile is answered, be it with an error, and after the restart all is as before. Who asks in the
    moment before the front end gives the worker up is in a batch that it may still be gathering."""
    loaded = num_ready(embedding_server)
    follower(embedding_server).kill()
    with ThreadPoolExecutor(4) as clients:
        statuses = list(clients.map(lambda text: post(embedding_server.url, {"text": text})[0], TEXTS))
    assert all(status in (200, 500, 503, 507) for status in statuses)
    wait_until(
        lambda: num_ready(embedding_server) > loaded and is_healthy(embedding_server),
        lambda: log_end(embedding_server),
    )
    answers = ask_at_once(embedding_server, [{"text": text} for text in TEXTS])
    vectors = torch.tensor([vector for _, vector in answers])
    torch.testing.assert_close(vectors, reference_embeddings(TEXTS), rtol=0, atol=1e-5)


@pytest.mark.torchserve
def test_rank_that_is_stopped_ends_in_a_restart(embedding_server: TorchServe) -> None:
    loaded, stopped = num_ready(embedding_server), follower(embedding_server)
    stopped.suspend()
    with ThreadPoolExecutor(4) as clients:
        statuses = list(clients.map(lambda text: post(embedding_server.url, {"text": text})[0], TEXTS))
    assert all(status in (200, 500, 503, 507) for status in statuses)  # 200: who came once it had been given up
    wait_until(
        lambda: num_ready(embedding_server) > loaded and is_healthy(embedding_server),
        lambda: log_end(embedding_server),
    )
    assert not stopped.is_running()
    assert f"rank 1 (process {stopped.pid}) is stopped" in embedding_server.log_text()
    answers = ask_at_once(embedding_server, [{"text": text} for text in TEXTS])
    vectors = torch.tensor([vector for _, vector in answers])
    torch.testing.assert_close(vectors, reference_embeddings(TEXTS), rtol=0, atol=1e-5)


def follower(server: TorchServe) -> psutil.Process:
    """The worker of rank 1."""
    assert server.pid is not None
    children = psutil.Process(server.pid).children(recursive=True)
    return next(child for child in children if child.environ().get("RANK") == "1")


USERS_FILE = """
from dataclasses import replace

from ts_parallel.errors import RequestError
from ts_parallel.serving.batch_inference import BatchInferenceHandler


class ReviewHandler(BatchInferenceHandler):
    def preprocess(self, item):
        review = item.fields().get("review")
        if not isinstance(review, str):
            raise RequestError("'review' must be a text", "review")
        return super().preprocess(replace(item, body={"text": review}))

    def postprocess(self, output):
        return {"stars": 1 + int(output.argmax()), "logits": output.tolist()}


_handler = ReviewHandler()


def handle(data, context):
    return _handler.handle(data, context)
"""


@pytest.mark.torchserve
def test_users_own_file_is_served_by_two_replicas_of_looped_stages(tmp_path: Path, reviews: Path) -> None:
    handler = tmp_path / "review_handler.py"
    handler.write_text(USERS_FILE)
    settings = MODEL_CONFIGS["embedding-pp2-cpu.yaml"] | {"minWorkers": 2, "maxWorkers": 2}
    settings["handler"] = settings["handler"] | {
        "task": "text_classification",
        "virtual_stages": 2,
        "micro_batch_size": 3,
    }
    texts = [f"{text} {number}" for number in range(6) for text in TEXTS]
    with served(tmp_path, settings, reviews, handler) as server:
        *answers, refused = ask_at_once(server, [*({"review": text} for text in texts), {"review": 5}])
    assert [status for status, _ in answers] == [200] * len(texts)
    model, tokenizer = BertForSequenceClassification.from_pretrained(reviews), AutoTokenizer.from_pretrained(reviews)
    for text, (_, answer) in zip(texts, answers, strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        torch.testing.assert_close(torch.tensor(answer["logits"]), logits, rtol=1e-4, atol=1e-4)
        assert answer["stars"] == 1 + answer["logits"].index(max(answer["logits"]))
    assert (refused[0], refused[1]["error"]["message"]) == (400, "'review' must be a text")


@pytest.mark.torchserve
def test_images_are_classified_over_ranks_as_plainly(tmp_path: Path, vit: Path) -> None:
    files = [picture(seed) for seed in range(12)]
    plain = pipeline("image-classification", model=str(vit), image_processor=ViTImageProcessorPil.from_pretrained(vit))
    expected = [plain(Image.open(io.BytesIO(file))) for file in files]
    with served(tmp_path, MODEL_CONFIGS["vision-tp2-cpu.yaml"], vit) as server:
        headers = {"Content-Type": "application/octet-stream"}
        answers = ask_at_once(server, [*files, files[0][:-200]], headers)
        health = get(f"{server.url}/1.0/health")
    assert_same_labels(answers[:-1], expected)
    assert answers[-1][0] == 400
    assert "no image that can be read" in answers[-1][1]["error"]["message"]
    assert health == (200, '{"status": "ok"}')
