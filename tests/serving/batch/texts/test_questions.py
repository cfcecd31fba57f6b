"""Answers are spans of the text, chosen as transformers chooses them, in windows where it is long; tokens for masks are
those of transformers' pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batch_worker import MINILM, Worker, lone_rank
from rank_answers import BOTH, answers_over_ranks
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    BertConfig,
    RobertaConfig,
    pipeline,
)
from transformers.pipelines.document_question_answering import select_starts_ends

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
QUESTION = "Who met whom near Reykjavik?"
TEXT = "Wolfgang Amadeus met hippopotamuses near Reykjavik, unbelievably; née Zoë  stayed in São-Paulo 🤗 yesterday."
LONG = " ".join(f"Visitor {number} came on day {number * 7 % 31} with {number % 5} friends." for number in range(12))


@pytest.fixture(scope="module", autouse=True)
def rank() -> Iterator[None]:
    with lone_rank():
        yield


def save(folder: Path, auto_class: Any, config: Any) -> Path:
    """A random model whose outputs vary with the words, with MiniLM's tokenizer."""
    torch.manual_seed(3)
    model = auto_class.from_config(config)
    for name, parameter in model.named_parameters():
        is_table = "word_embeddings" in name or "position_embeddings" in name
        std = 1.5 if is_table else 0.5 if name.endswith("bias") else 0.4
        torch.nn.init.normal_(parameter, std=std, mean=1.0 if "LayerNorm.weight" in name else 0.0)
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MINILM).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = BertConfig(**SIZES, max_position_embeddings=64)
    return save(tmp_path_factory.mktemp("reader"), AutoModelForQuestionAnswering, config)


@pytest.fixture(scope="module")
def worker(reader: Path) -> Worker:
    return Worker("question_answering", reader, max_items=40)


def plain_answers(
    folder: Path, question: str, text: str, top_k: int = 1, may_be_none: bool = False, **asked: int
) -> list[dict[str, Any]]:
    """By the plain model, window by window, and transformers' own choice of spans; places from offsets alone."""
    longest, stride = asked.get("max_seq_len", 64), asked.get("doc_stride", 32)
    model, tokenizer = AutoModelForQuestionAnswering.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    cut = {"truncation": "only_second", "max_length": longest, "stride": stride, "return_overflowing_tokens": True}
    encoded = tokenizer(question, text, **cut)
    found: dict[str, dict[str, Any]] = {}
    none = 1000000.0
    for window in encoded.encodings:
        inputs = {"input_ids": window.ids, "attention_mask": window.attention_mask, "token_type_ids": window.type_ids}
        with torch.no_grad():
            output = model(**{name: torch.tensor([value]) for name, value in inputs.items()})
        masked = [number != 1 for number in window.sequence_ids]
        masked[0] = False
        starts, ends, scores, none = select_starts_ends(
            output.start_logits.numpy(),
            output.end_logits.numpy(),
            np.array(masked, int),
            np.ones((1, len(window.ids)), int),
            none,
            top_k * 2 + 10,
            may_be_none,
            asked.get("max_answer_len", 15),
        )
        for start, end, score in zip(starts, ends, scores, strict=True):
            if start == 0 or end < start:  # which the plain choice may count among the last, with a score of 0
                continue
            first, last = (window.word_to_chars(window.token_to_word(int(token)), 1) for token in (start, end))
            words = text[first[0] : last[1]]
            own = found.setdefault(words.lower(), {"score": 0.0, "start": first[0], "end": last[1], "answer": words})
            own["score"] += float(score)
    answers = [*found.values(), *([{"score": none, "start": 0, "end": 0, "answer": ""}] if may_be_none else [])]
    return sorted(answers, key=lambda answer: -answer["score"])[:top_k]


def assert_same(answers: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(answers) == len(expected)
    for ours, theirs in zip(answers, expected, strict=True):
        assert ours["score"] == pytest.approx(theirs["score"], rel=1e-3, abs=1e-6)
        assert {**ours, "score": 0} == {**theirs, "score": 0}


def test_answer_is_the_likeliest_span_and_several_are_in_their_order(worker: Worker, reader: Path) -> None:
    """Of texts of one window and of several, which share micro-batches."""
    asked = {"question": QUESTION, "context": TEXT}
    one, several, long, none = worker.ask(
        asked,
        {**asked, "top_k": 4},
        {"question": QUESTION, "context": LONG, "top_k": 6, "max_answer_len": 4},
        {**asked, "top_k": 40, "handle_impossible_answer": True},
    )
    expected = plain_answers(reader, QUESTION, TEXT, 4)
    assert one == (200, several[1][0])
    assert_same(several[1], expected)
    assert_same(long[1], plain_answers(reader, QUESTION, LONG, 6, max_answer_len=4))
    assert any(answer == {**answer, "start": 0, "end": 0, "answer": ""} for answer in none[1])
    assert len({answer["answer"] for answer in several[1]}) == 4


def test_windows_are_as_long_as_is_asked_and_overlap(worker: Worker, reader: Path) -> None:
    asked = {"max_seq_len": 30, "doc_stride": 8}
    (answer,) = worker.ask({"question": QUESTION, "context": LONG, "top_k": 5, **asked})
    assert_same(answer[1], plain_answers(reader, QUESTION, LONG, 5, **asked))


def test_answers_may_be_pieces_of_words(worker: Worker) -> None:
    text = "antidisestablishmentarianism unbelievably hippopotamuses"
    asked = {"question": QUESTION, "context": text, "top_k": 12}
    whole, pieces = worker.ask(asked, {**asked, "align_to_words": False})
    words = text.split()
    assert all(word in words for own in whole[1] for word in own["answer"].split())
    assert any(word not in words for own in pieces[1] for word in own["answer"].split())


BAD_QUESTIONS = [
    ({"question": "who?"}, "'context' must be a text, got None", "context"),
    ({"question": "", "context": "a"}, "'question' is empty", "question"),
    ({"question": "who?", "context": " "}, "'context' is empty", "context"),
    ({"question": 5, "context": "a"}, "'question' must be a text, got 5", "question"),
    ({"question": "who " * 40, "context": "a"}, "it must have fewer than max_seq_len, which is 64", "question"),
    ({"question": "who?", "context": "a " * 2000}, "windows, one request takes at most 40", "context"),
    ({"question": "who?", "context": "a", "top_k": 0}, "'top_k' must be a number from 1 to 100, got 0", "top_k"),
    ({"question": "who?", "context": "a", "max_seq_len": 65}, "a number from 1 to 64, got 65", "max_seq_len"),
    ({"question": "who?", "context": "a", "align_to_words": 1}, "must be true or false, got 1", "align_to_words"),
    ({"question": "who?", "context": "a", "answers": 1}, "unknown field 'answers'", "answers"),
    (b"who?", "the body is not JSON", None),
]


@pytest.mark.parametrize(("body", "says", "parameter"), BAD_QUESTIONS)
def test_bad_question_is_refused_alone(worker: Worker, body: Any, says: str, parameter: str | None) -> None:
    good = {"question": QUESTION, "context": TEXT}
    (first, _), (status, answer), (last, _) = worker.ask(good, body, good)
    assert (first, status, last) == (200, 400, 200)
    assert says in answer["error"]["message"]
    assert answer["error"]["param"] == parameter


@pytest.fixture(scope="module", params=["bert", "roberta"])
def filler(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind = BertConfig if request.param == "bert" else RobertaConfig
    ids = {"pad_token_id": 0, "bos_token_id": 101, "eos_token_id": 102}
    config = kind(**SIZES, **ids, vocab_size=30522, max_position_embeddings=64)
    return save(tmp_path_factory.mktemp(request.param), AutoModelForMaskedLM, config)


def assert_filled(answer: Any, expected: Any) -> None:
    if expected and isinstance(expected[0], list):
        for own, theirs in zip(answer, expected, strict=True):
            assert_filled(own, theirs)
        return
    for ours, theirs in zip(answer, expected, strict=True):
        assert ours["score"] == pytest.approx(theirs["score"], rel=1e-3, abs=1e-7)
        assert {**ours, "score": 0} == {**theirs, "score": 0}


MASKED = ["A [MASK] sits on the mat.", "Stocks [MASK].", "The [MASK] is [MASK] today, and it was yesterday too."]


def test_tokens_for_masks_are_those_of_transformers_pipeline(filler: Path) -> None:
    plain = pipeline("fill-mask", model=str(filler))
    worker = Worker("fill_mask", filler)
    *single, listed, few, among = worker.ask(
        *({"text": text} for text in MASKED),
        {"input": MASKED},
        {"text": MASKED[0], "top_k": 2},
        {"text": MASKED[0], "targets": ["cat", "dog", "mat"]},
    )
    expected = [plain(text) for text in MASKED]
    for answer, wanted in zip(single, expected, strict=True):
        assert answer[0] == 200, answer
        assert_filled(answer[1], wanted)
    assert listed == (200, [answer for _, answer in single])
    assert_filled(few[1], plain(MASKED[0], top_k=2))
    assert_filled(among[1], plain(MASKED[0], targets=["cat", "dog", "mat"]))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"text": "no mask"}, "the text has no mask, which is '[MASK]'"),
        ({"input": [MASKED[0], "none"]}, "input[1]: the text has no mask"),
        ({"text": 5}, "'text' must be a text, got 5"),
        ({"text": "word " * 70 + "[MASK]"}, "the text has "),
        ({"text": MASKED[0], "top_k": 101}, "a number from 1 to 100, got 101"),
        ({"text": MASKED[0], "targets": []}, "'targets' must be a text or a list of texts, got []"),
        ({"text": MASKED[0], "targets": ["hippopotamuses"]}, "'hippopotamuses', which is 5 tokens"),
    ],
)
def test_bad_mask_is_refused_alone(filler: Path, body: Any, says: str) -> None:
    good = {"text": MASKED[0]}
    (first, _), (status, answer), (last, _) = Worker("fill_mask", filler).ask(good, body, good)
    assert (first, status, last) == (200, 400, 200)
    assert says in answer["error"]["message"]


@pytest.mark.ranks
def test_two_ranks_and_two_stages_answer_alike(reader: Path, filler: Path, tmp_path: Path) -> None:
    """A head of the vocabulary is cut and gathered."""
    questions = [{"question": QUESTION, "context": text, "top_k": 3} for text in (TEXT, LONG)]
    asked = {
        reader: ("question_answering", questions, BOTH),
        filler: ("fill_mask", [{"text": text} for text in MASKED], BOTH),
    }
    answers = answers_over_ranks(asked, tmp_path)
    plain = pipeline("fill-mask", model=str(filler))
    for shape in ("2 × 1", "1 × 2"):
        for text, own in zip((TEXT, LONG), answers[reader][shape], strict=True):
            assert_same(own, plain_answers(reader, QUESTION, text, 3))
        for text, own in zip(MASKED, answers[filler][shape], strict=True):
            assert_filled(own, plain(text))
