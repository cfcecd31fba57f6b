"""Scores and ranks are those of sentence-transformers' CrossEncoder, classes those of transformers' pipelines: of pairs
of texts whose second one has other token types, cut as they cut them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from batch_worker import MINILM, Worker, lone_rank
from sentence_transformers import CrossEncoder
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, pipeline

from ts_parallel.errors import CheckpointError
from ts_parallel.serving.batch.texts.classification import read_activation

QUERY = "What is the weather like?"
DOCUMENTS = ["It is lovely today.", "Stocks fell.", "Rain, rain and more rain " * 9, "x"]
RERANK, SCORE, CLASSIFY = ({"url_path": f"v1/{name}"} for name in ("rerank", "score", "classify"))


@pytest.fixture(scope="module", autouse=True)
def rank() -> Iterator[None]:
    with lone_rank():
        yield


def save(folder: Path, num_labels: int) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(**sizes, max_position_embeddings=40, num_labels=num_labels)
    model = BertForSequenceClassification(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=1.0)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MINILM, model_max_length=40).save_pretrained(folder)


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reranker")
    save(folder, 1)
    return folder


@pytest.fixture(scope="module")
def worker(reranker: Path) -> Worker:
    return Worker("text_classification", reranker, max_items=4)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Worker]:
    folder = tmp_path_factory.mktemp("three")
    save(folder, 3)
    return folder, Worker("text_classification", folder)


def cross_encoder(folder: Path) -> CrossEncoder:
    return CrossEncoder(str(folder), device="cpu", local_files_only=True)


def test_documents_are_ranked_as_by_cross_encoder(worker: Worker, reranker: Path) -> None:
    """On the route and on the model's own URL; documents as texts or as objects, with or without them in the answer."""
    objects = [{"text": text} for text in DOCUMENTS]
    ranked, first_two = worker.ask(
        {"query": QUERY, "documents": DOCUMENTS, "model": "m"},
        {"query": QUERY, "documents": objects, "top_n": 2, "return_documents": False},
        headers={0: RERANK},
    )
    expected = cross_encoder(reranker).rank(QUERY, DOCUMENTS)
    results = ranked[1]["results"]
    assert [own["index"] for own in results] == [own["corpus_id"] for own in expected]
    assert [own["relevance_score"] for own in results] == pytest.approx([own["score"] for own in expected], abs=1e-5)
    assert [own["document"] for own in results] == [{"text": DOCUMENTS[own["index"]]} for own in results]
    assert len({round(own["score"], 4) for own in expected}) == 4
    assert first_two[1]["results"] == [
        {"index": own["index"], "relevance_score": own["relevance_score"]} for own in results[:2]
    ]
    assert ranked[1]["usage"]["total_tokens"] > 40


def test_pairs_are_scored_as_by_cross_encoder(worker: Worker, reranker: Path) -> None:
    """One text with each of several, or as many with as many."""
    one, many = worker.ask(
        {"text_1": QUERY, "text_2": DOCUMENTS}, {"text_1": DOCUMENTS, "text_2": [QUERY] * 4}, headers={0: SCORE}
    )
    model = cross_encoder(reranker)
    for (status, answer), pairs in (
        (one, [(QUERY, text) for text in DOCUMENTS]),
        (many, [(text, QUERY) for text in DOCUMENTS]),
    ):
        assert status == 200
        assert [own["score"] for own in answer["data"]] == pytest.approx(model.predict(pairs).tolist(), abs=1e-5)
        assert [own["index"] for own in answer["data"]] == [0, 1, 2, 3]


@pytest.mark.parametrize("place", ["saved", "sbert_ce_default_activation_function", "sentence_transformers"])
def test_activation_is_the_folders_own(reranker: Path, tmp_path: Path, place: str) -> None:
    """As old and new versions of sentence-transformers write it."""
    folder = tmp_path / "own"
    if place == "saved":
        model = cross_encoder(reranker)
        model.activation_fn = torch.nn.Identity()
        model.save_pretrained(str(folder))
    else:
        shutil.copytree(reranker, folder)
        identity = "torch.nn.modules.linear.Identity"
        config = json.loads((folder / "config.json").read_text())
        config[place] = {"activation_fn": identity} if place == "sentence_transformers" else identity
        (folder / "config.json").write_text(json.dumps(config))
    expected = cross_encoder(folder).predict([(QUERY, text) for text in DOCUMENTS]).tolist()
    assert min(expected) < 0
    (answer,) = Worker("text_classification", folder).ask({"text_1": QUERY, "text_2": DOCUMENTS})
    assert [own["score"] for own in answer[1]["data"]] == pytest.approx(expected, abs=1e-4)


def test_unknown_activation_is_refused_at_the_start(reranker: Path, tmp_path: Path) -> None:
    (tmp_path / "config_sentence_transformers.json").write_text('{"activation_fn": "my.own.Thing"}')
    with pytest.raises(CheckpointError, match=r"activation_fn 'my\.own\.Thing' cannot be served"):
        read_activation(tmp_path, BertConfig(num_labels=1))


def test_texts_are_classified_in_vllms_shape(three: tuple[Path, Worker]) -> None:
    folder, worker = three
    (answer,) = worker.ask({"input": DOCUMENTS[:2]}, headers={0: CLASSIFY})
    expected = pipeline("text-classification", model=str(folder), top_k=None)(DOCUMENTS[:2])
    for index, (own, labels) in enumerate(zip(answer[1]["data"], expected, strict=True)):
        scores = {entry["label"]: entry["score"] for entry in labels}
        assert (own["index"], own["label"], own["num_classes"]) == (index, labels[0]["label"], 3)
        assert own["probs"] == pytest.approx([scores[f"LABEL_{number}"] for number in range(3)], abs=1e-5)


def test_pair_of_texts_is_labelled_as_by_transformers_pipeline(three: tuple[Path, Worker]) -> None:
    folder, worker = three
    pair = {"text": QUERY, "text_pair": DOCUMENTS[0]}
    (answer,) = worker.ask(pair)
    expected = pipeline("text-classification", model=str(folder), top_k=None)(pair)
    assert [own["label"] for own in answer[1]] == [own["label"] for own in expected]
    assert [own["score"] for own in answer[1]] == pytest.approx([own["score"] for own in expected], abs=1e-5)


BAD = [
    ({"query": "a", "documents": []}, "'documents' is empty", "documents"),
    ({"query": "a", "documents": ["b"] * 5}, "'documents' has 5 items, one request takes at most 4", "documents"),
    ({"query": "a", "documents": "b"}, "'documents' must be a list of texts, got 'b'", "documents"),
    ({"query": "a", "documents": ["b", 5]}, "'documents[1]' must be a text, got 5", "documents"),
    ({"documents": ["b"]}, "'query' must be a text, got None", "query"),
    ({"query": "a", "documents": ["b"], "top_n": 0}, "'top_n' must be a number from 1, got 0", "top_n"),
    ({"query": "a", "documents": ["b"], "top_k": 1}, "unknown field 'top_k': did you mean 'top_n'?", "top_k"),
    ({"text_1": ["a", "b"], "text_2": ["c"]}, "'text_1' has 2 texts, 'text_2' 1", "text_1"),
    ({"text_1": "a", "text_2": []}, "'text_2' is empty", "text_2"),
    ({"text_1": "a"}, "'text_2' must be a list of texts, got None", "text_2"),
    ({"input": ["a", 1]}, "'input' must be a text or a list of texts", "input"),
]


@pytest.mark.parametrize(("body", "says", "parameter"), BAD)
def test_what_is_wrong_refuses_the_request_alone(worker: Worker, body: Any, says: str, parameter: str) -> None:
    good = {"query": QUERY, "documents": DOCUMENTS}
    (first, _), (status, answer), (last, _) = worker.ask(good, body, good)
    assert (first, status, last) == (200, 400, 200)
    assert says in answer["error"]["message"] and answer["error"]["param"] == parameter


def test_scores_of_a_model_with_several_labels_are_refused(three: tuple[Path, Worker]) -> None:
    ((status, answer),) = three[1].ask({"query": QUERY, "documents": DOCUMENTS}, headers={0: RERANK})
    assert status == 400 and "has several labels" in answer["error"]["message"]
