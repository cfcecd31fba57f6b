"""Vectors are those of sentence-transformers, whatever the folder says of pooling, heads, prompts and lengths; bodies
and answers are OpenAI's, and each thing that is wrong with one is said."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from batch_worker import MINILM, Worker, lone_rank
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoTokenizer, BertConfig, BertModel

from ts_parallel.errors import CheckpointError
from ts_parallel.partition.model.sentence_modules import read_sentence_modules
from ts_parallel.serving.batch.texts.embedding import SentenceHead
from ts_parallel.serving.batch.texts.reading import read_text_rules

ROUTE = {"url_path": "v1/embeddings"}
TEXTS = ["A cat sits on the mat.", "Stocks fell.", "The weather is lovely today, and it was yesterday too.", "x"]
LONG = "word after word and so on, " * 30


@pytest.fixture(scope="module", autouse=True)
def rank() -> Iterator[None]:
    with lone_rank():
        yield


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT with MiniLM's tokenizer, which sentence-transformers' modules are put behind."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(**sizes, max_position_embeddings=48))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MINILM).save_pretrained(folder)
    return folder


def saved(folder: Path, plain: Path, *modules: Any, **settings: Any) -> SentenceTransformer:
    """sentence-transformers' own model of the plain one and `modules`, saved to `folder` and read again."""
    model = Transformer(str(plain), max_seq_length=20)
    SentenceTransformer(modules=[model, *modules], device="cpu", **settings).save(str(folder))
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def vectors_of(answer: Any) -> torch.Tensor:
    return torch.tensor([own["embedding"] for own in answer["data"]])


def assert_equal(answer: tuple[int, Any], expected: Any) -> None:
    assert answer[0] == 200, answer
    torch.testing.assert_close(vectors_of(answer[1]), torch.as_tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def prompted(tmp_path_factory: pytest.TempPathFactory, plain: Path) -> tuple[Path, SentenceTransformer]:
    """Two poolings side by side without the prompt's tokens, then a Dense and a norm; with prompts."""
    folder = tmp_path_factory.mktemp("prompted")
    pooling = Pooling(16, ("cls", "mean"), include_prompt=False)
    torch.manual_seed(1)
    head = (Dense(32, 12, activation_function=torch.nn.Tanh()), Normalize())
    prompts = {"query": "search for: ", "short": "q "}
    return folder, saved(folder, plain, pooling, *head, prompts=prompts, default_prompt_name="query")


@pytest.fixture(scope="module")
def worker(prompted: tuple[Path, SentenceTransformer]) -> Worker:
    return Worker("text_embedding", prompted[0], max_items=5)


def test_default_prompt_dense_and_norm_are_those_of_the_folder(worker: Worker, prompted: Any) -> None:
    """On the route, on the model's own URL, and for its own body, which is answered by the vector alone."""
    expected = prompted[1].encode(TEXTS)
    body = {"input": TEXTS, "model": "m"}
    on_route, on_url, *single = worker.ask(body, body, *({"text": text} for text in TEXTS), headers={0: ROUTE})
    assert_equal(on_route, expected)
    assert_equal(on_url, expected)
    torch.testing.assert_close(
        torch.tensor([vector for _, vector in single]), torch.tensor(expected), atol=1e-5, rtol=1e-4
    )
    assert [own["index"] for own in on_route[1]["data"]] == [0, 1, 2, 3]
    assert on_route[1]["object"] == "list" and on_route[1]["model"] == "m"


@pytest.mark.parametrize(
    "asked", [{"prompt_name": "short"}, {"prompt": "another one: "}, {"prompt": ""}, {"prompt_name": "document"}]
)
def test_prompt_that_a_request_names_stands_before_each_text(worker: Worker, prompted: Any, asked: Any) -> None:
    (answer,) = worker.ask({"input": TEXTS, **asked})
    assert_equal(answer, prompted[1].encode(TEXTS, **asked))


def test_text_that_is_too_long_is_cut_as_the_folder_says(worker: Worker, prompted: Any) -> None:
    texts = [LONG, TEXTS[0], LONG + LONG]
    (answer,) = worker.ask({"input": texts})
    assert_equal(answer, prompted[1].encode(texts))
    assert answer[1]["usage"] == {"prompt_tokens": 20 + 12 + 20, "total_tokens": 52}


def test_real_minilm_cuts_as_sentence_transformers_does() -> None:
    texts = [LONG * 3, "short", LONG * 4]
    (answer,) = Worker("text_embedding", MINILM).ask({"input": texts})
    assert_equal(answer, SentenceTransformer(str(MINILM), device="cpu", local_files_only=True).encode(texts))
    assert answer[1]["usage"]["prompt_tokens"] == 256 + 3 + 256


def test_token_ids_are_taken_as_they_are(worker: Worker, prompted: Any) -> None:
    """One list of them, or several, are the vectors of the texts that they are of, without a prompt."""
    tokenizer = prompted[1].tokenizer
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    many, one = worker.ask({"input": ids}, {"input": ids[2]})
    expected = prompted[1].encode(TEXTS, prompt="")
    assert_equal(many, expected)
    assert_equal(one, expected[2:3])
    assert one[1]["usage"]["prompt_tokens"] == len(ids[2])


def test_numbers_come_as_base64_of_little_endian_floats(worker: Worker) -> None:
    plainly, coded = worker.ask({"input": TEXTS}, {"input": TEXTS, "encoding_format": "base64", "user": "u"})
    for numbers, own in zip(vectors_of(plainly[1]), coded[1]["data"], strict=True):
        floats = memoryview(base64.b64decode(own["embedding"])).cast("f").tolist()
        assert floats == numbers.tolist()


def test_fewer_dimensions_are_the_first_numbers_of_length_one(worker: Worker, prompted: Any) -> None:
    (answer, whole) = worker.ask({"input": TEXTS, "dimensions": 5}, {"input": TEXTS, "dimensions": 12.0})
    expected = torch.nn.functional.normalize(torch.tensor(prompted[1].encode(TEXTS))[:, :5], dim=1)
    assert_equal(answer, expected)
    assert_equal(whole, prompted[1].encode(TEXTS))


POOLINGS = ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]


@pytest.mark.parametrize("spelling", ["new", "old"])
def test_every_pooling_is_that_of_sentence_transformers(plain: Path, tmp_path: Path, spelling: str) -> None:
    """All at once, side by side in the library's order, as its newest version writes them and as the others did."""
    model = saved(tmp_path / "all", plain, Pooling(16, tuple(POOLINGS)))
    if spelling == "old":
        names = [name + "_tokens" * (name in ("max", "mean", "weightedmean")) for name in POOLINGS]
        names[0] = "cls_token"
        old = {"word_embedding_dimension": 16, **{f"pooling_mode_{name}": True for name in names}}
        (tmp_path / "all" / "1_Pooling" / "config.json").write_text(json.dumps(old))
        model = SentenceTransformer(str(tmp_path / "all"), device="cpu", local_files_only=True)
    (answer,) = Worker("text_embedding", tmp_path / "all").ask({"input": TEXTS})
    assert len(answer[1]["data"][0]["embedding"]) == 16 * len(POOLINGS)
    assert_equal(answer, model.encode(TEXTS))


def test_folders_own_dimensions_and_lower_case_hold(plain: Path, tmp_path: Path) -> None:
    """Of one whose tokenizer tells capital letters apart."""
    cased = tmp_path / "cased"
    shutil.copytree(plain, cased)
    backend = json.loads((cased / "tokenizer.json").read_text())
    backend["normalizer"] = None
    (cased / "tokenizer.json").write_text(json.dumps(backend))
    saved(tmp_path / "small", cased, Pooling(16, "mean"), truncate_dim=7)
    file = tmp_path / "small" / "sentence_bert_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_lower_case": True}))
    model = SentenceTransformer(str(tmp_path / "small"), device="cpu", local_files_only=True)
    texts = ["The Cat", "the cat", "STOCKS fell"]
    (answer,) = Worker("text_embedding", tmp_path / "small").ask({"input": texts})
    expected = model.encode(texts)
    assert expected.shape == (3, 7)
    assert_equal(answer, expected)
    assert answer[1]["data"][0]["embedding"] == pytest.approx(answer[1]["data"][1]["embedding"])


BAD = [
    ({"input": []}, "'input' is empty", "input"),
    ({}, "'input' must be a text, a list of texts, token ids", "input"),
    ({"input": 5}, "got 5", "input"),
    ({"input": ["a", 5]}, "got ['a', 5]", "input"),
    ({"input": ["a", "", "b"], "prompt": "", "add_special_tokens": False}, "input[1]: the text is empty", "text"),
    ({"input": [[1, 2], []]}, "input[1]: the text is empty", "input"),
    ({"input": [[1, 2], [3, 30522]]}, "input[1]: token id 30522 at position 1", "input"),
    ({"input": [1, -1]}, "token id -1", "input"),
    ({"input": [1, 2.5]}, "2.5 at position 1 of input is no token id", "input"),
    ({"input": ["a"] * 6}, "'input' has 6 items, one request takes at most 5", "input"),
    ({"input": "a", "dimensions": 13}, "'dimensions' must be a number from 1 to 12, got 13", "dimensions"),
    ({"input": "a", "dimensions": 0}, "'dimensions' must be a number from 1, got 0", "dimensions"),
    ({"input": "a", "encoding_format": "int8"}, "must be one of ['float', 'base64'], got 'int8'", "encoding_format"),
    ({"input": "a", "prompt_name": "zork"}, "one of ['document', 'query', 'short'], got 'zork'", "prompt_name"),
    ({"input": [1, 2], "prompt": "a"}, "a prompt stands before texts", "prompt"),
    ({"input": "a", "truncate_prompt_tokens": 21}, "a number from 1 to 20, got 21", "truncate_prompt_tokens"),
    ({"input": "a", "dimension": 2}, "unknown field 'dimension': did you mean 'dimensions'?", "dimension"),
]


@pytest.mark.parametrize(("body", "says", "parameter"), BAD)
def test_what_is_wrong_refuses_the_whole_request_alone(worker: Worker, body: Any, says: str, parameter: str) -> None:
    good = {"input": TEXTS}
    (first, _), (status, answer), (last, _) = worker.ask(good, body, good, headers=dict.fromkeys(range(3), ROUTE))
    assert (first, status, last) == (200, 400, 200)
    assert says in answer["error"]["message"]
    assert answer["error"]["param"] == parameter


def test_most_items_and_null_fields_are_taken(worker: Worker) -> None:
    (answer,) = worker.ask({"input": ["a"] * 5, "dimensions": None, "user": None, "prompt": None})
    assert (answer[0], len(answer[1]["data"])) == (200, 5)


def test_ranks_and_scores_are_cosines(worker: Worker, prompted: Any) -> None:
    query, documents = TEXTS[0], [*TEXTS[1:], TEXTS[1]]
    vectors = torch.tensor(prompted[1].encode([query, *documents]))
    cosines = torch.nn.functional.cosine_similarity(vectors[:1], vectors[1:]).tolist()
    ranked, scored = worker.ask(
        {"query": query, "documents": documents, "top_n": 3},
        {"text_1": query, "text_2": documents},
        headers={0: {"url_path": "v1/rerank"}, 1: {"url_path": "v1/score"}},
    )
    order = sorted(range(4), key=lambda at: -cosines[at])[:3]
    assert [own["index"] for own in ranked[1]["results"]] == order
    assert [own["relevance_score"] for own in ranked[1]["results"]] == pytest.approx(
        [cosines[at] for at in order], abs=1e-5
    )
    assert [own["score"] for own in scored[1]["data"]] == pytest.approx(cosines, abs=1e-5)


def write(folder: Path, *modules: tuple[str, dict[str, Any]], **texts: Any) -> Path:
    """A folder of sentence-transformers, of its settings alone."""
    listed = []
    for number, (kind, settings) in enumerate((("Transformer", {}), *modules)):
        path = f"{number}_{kind}" if number else ""
        listed.append({"idx": number, "path": path, "type": f"sentence_transformers.models.{kind}"})
        (folder / path).mkdir(exist_ok=True)
        if number:
            (folder / path / "config.json").write_text(json.dumps(settings))
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "sentence_bert_config.json").write_text(json.dumps(texts))
    return folder


MEAN = ("Pooling", {"pooling_mode": "mean"})
DENSE = {"in_features": 16, "out_features": 4}


@pytest.mark.parametrize(
    ("modules", "texts", "says"),
    [
        ([("Pooling", {"pooling_mode": "zork"})], {}, r"pools by \['zork'\]; \['cls', "),
        ([("Pooling", {"pooling_mode_zork_tokens": True})], {}, r"pools by \['pooling_mode_zork_tokens'\]"),
        ([MEAN, ("LSTM", {})], {}, "has a module 'LSTM', which cannot be served"),
        ([("Normalize", {})], {}, r"begins with \['Transformer', 'Normalize'\]"),
        ([MEAN, ("Dense", {**DENSE, "module_input_name": "token_embeddings"})], {}, "a Dense of 'token_embeddings'"),
        ([MEAN, ("Dense", {**DENSE, "in_features": None})], {}, "in_features must be a size, got None"),
        ([MEAN], {"processing_kwargs": {"text": {}}}, "processing_kwargs .* cannot be served"),
        ([MEAN], {"zork": 1}, "zork 1 cannot be served"),
    ],
)
def test_folder_with_what_is_not_understood_is_refused_by_name(
    tmp_path: Path, modules: Any, texts: dict[str, Any], says: str
) -> None:
    write(tmp_path, *modules, **texts)
    with pytest.raises(CheckpointError, match=says):
        SentenceHead(read_sentence_modules(tmp_path))
        read_text_rules(tmp_path, is_cut=True)


def test_settings_above_a_distributed_checkpoint_hold(prompted: Any, worker: Worker, tmp_path: Path) -> None:
    """Where the weights lie in a folder of their own, what sentence-transformers says stands beside config.json."""
    home = tmp_path / "home"
    shutil.copytree(prompted[0], home)
    (home / "model.safetensors").unlink()
    model = BertModel.from_pretrained(prompted[0])
    dcp.save(dict(model.state_dict()), checkpoint_id=home / "step-1")
    ours, theirs = Worker("text_embedding", home / "step-1").ask({"input": TEXTS}), worker.ask({"input": TEXTS})
    torch.testing.assert_close(vectors_of(ours[0][1]), vectors_of(theirs[0][1]), rtol=1e-4, atol=1e-5)
