"""Entities are those of transformers' pipeline for tokens, by every strategy, with marks of subwords and without."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from batch_worker import MINILM, Worker, lone_rank
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
    pipeline,
)

from ts_parallel.serving.batch.texts.entities import STRATEGIES

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC"]
TEXTS = [
    "Wolfgang Amadeus met hippopotamuses near Reykjavik, unbelievably.",
    "née Zoë  in São-Paulo 🤗 yesterday",
    "x",
    "antidisestablishmentarianism " * 3,
]


@pytest.fixture(scope="module", autouse=True)
def rank() -> Iterator[None]:
    with lone_rank():
        yield


def byte_level() -> PreTrainedTokenizerFast:
    """Tokens of single bytes, as GPT's and RoBERTa's are: none is marked as the rest of a word."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<unk>", *letters])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")


@pytest.fixture(scope="module", params=["word pieces", "bytes"])
def tagger(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Worker, Any]:
    """The handler, and the pipeline for the same folder."""
    folder = tmp_path_factory.mktemp("tagger")
    tokenizer = AutoTokenizer.from_pretrained(MINILM) if request.param == "word pieces" else byte_level()
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(
        **sizes, vocab_size=len(tokenizer), max_position_embeddings=128, id2label=dict(enumerate(LABELS))
    )
    model = BertForTokenClassification(config)
    for name, parameter in model.named_parameters():
        std = 3.0 if "word_embeddings" in name else 0.0 if name.endswith("bias") else 0.2  # labels vary with the words
        torch.nn.init.normal_(parameter, std=std, mean=1.0 if "LayerNorm.weight" in name else 0.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Worker("token_classification", folder), pipeline("ner", model=str(folder))


def assert_same(answer: tuple[int, Any], expected: list[dict[str, Any]]) -> None:
    assert answer[0] == 200, answer
    assert len(answer[1]) == len(expected)
    for ours, theirs in zip(answer[1], expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["score"] == pytest.approx(float(theirs["score"]), abs=1e-5)
        assert {**ours, "score": 0} == {**theirs, "score": 0}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_entities_are_those_of_transformers_pipeline(tagger: tuple[Worker, Any], strategy: str) -> None:
    """Texts of unlike lengths that share a micro-batch, one by one and as a list."""
    worker, plain = tagger
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bytes know no words, says the pipeline
        expected = [plain(text, aggregation_strategy=strategy) for text in TEXTS]
    asked = {"aggregation_strategy": strategy}
    *single, listed = worker.ask(*({"text": text, **asked} for text in TEXTS), {"input": TEXTS, **asked})
    for answer, wanted in zip(single, expected, strict=True):
        assert_same(answer, wanted)
    assert listed == (200, [answer for _, answer in single])
    assert sum(map(len, expected)) > 6


def test_raw_text_has_each_token_but_those_without_a_label(tagger: tuple[Worker, Any]) -> None:
    worker, plain = tagger
    raw, all_labels = worker.ask(TEXTS[0].encode(), {"text": TEXTS[0], "ignore_labels": []})
    assert_same(raw, plain(TEXTS[0]))
    assert_same(all_labels, plain(TEXTS[0], ignore_labels=[]))
    assert len(all_labels[1]) > len(raw[1])


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"text": "a", "aggregation_strategy": "last"}, "'aggregation_strategy' must be one of ['none', 'simple'"),
        ({"text": "a", "ignore_labels": "O"}, "'ignore_labels' must be a list of labels, got 'O'"),
        ({"text": 5}, "'text' must be a text, got 5"),
        ({"input": []}, "'input' is empty"),
        ({"input": ["a", "word " * 130]}, "input[1]: the text has "),
        ({"text": "a", "stride": 2}, "unknown field 'stride'"),
    ],
)
def test_what_is_wrong_is_refused(tagger: tuple[Worker, Any], body: Any, says: str) -> None:
    good, (status, answer) = tagger[0].ask({"text": "a"}, body)
    assert (good[0], status) == (200, 400)
    assert says in answer["error"]["message"]
