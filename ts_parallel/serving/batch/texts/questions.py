"""Answers to questions, found in a text: spans of it, as transformers' pipeline of version 4 chose them.

A text that is longer than the model takes is read in windows that overlap; the answers of all of them compete, and one
that several find has their scores together. A span's score is the probability of its first token as a start times that
of its last as an end, among the text's tokens in its window.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ts_parallel.errors import CheckpointError, RequestError
from ts_parallel.serving.batch.jobs import Done, Inputs, Work, count_field, known_fields
from ts_parallel.serving.batch.texts.reading import TextReader
from ts_parallel.serving.exchange import RawRequest, echo

_FLAGS = ("handle_impossible_answer", "align_to_words")
FIELDS = ("question", "context", "top_k", "doc_stride", "max_answer_len", "max_seq_len", *_FLAGS, "model", "user")
_WINDOW, _STRIDE, _LONGEST_ANSWER = 384, 128, 15  # tokens, where nothing else is said
_MOST_ANSWERS = 100


@dataclass(frozen=True)
class Asked:
    """How a request wants its answers."""

    num_answers: int
    longest: int
    """The most tokens of one."""
    may_be_none: bool
    """Whether "the text does not say" is an answer, an empty one."""
    keeps_words: bool
    """Whether answers are made of whole words."""


class QuestionApi:
    """`[S, 2]` of each window → the best answers of a text."""

    def __init__(self, reader: TextReader, most_windows: int) -> None:
        """
        Raises:
            CheckpointError: the tokenizer does not know where in a text its tokens stand.
        """
        if not reader.tokenizer.is_fast:
            kind = type(reader.tokenizer).__name__
            raise CheckpointError(f"question_answering needs a tokenizer that knows the places of tokens, not {kind}")
        self._reader = reader
        self._most_windows = most_windows
        # To cut into windows changes a fast tokenizer for all who use it.
        self._tokenizer, self._cuts_one = copy.deepcopy(reader.tokenizer), threading.Lock()
        self._text = 0 if self._tokenizer.padding_side == "left" else 1
        """The number of the text in a pair with its question."""

    def open(self, item: RawRequest) -> Work:
        """
        Raises:
            RequestError: the body has no question or no text, or a field that is unknown or out of its limits.
        """
        fields = known_fields(item, FIELDS)
        question, text = (_text(fields, name) for name in ("question", "context"))
        flags = [_flag(fields, name, usual) for name, usual in zip(_FLAGS, (False, True), strict=True)]
        asked = Asked(
            count_field(fields, "top_k", _MOST_ANSWERS) or 1,
            count_field(fields, "max_answer_len") or _LONGEST_ANSWER,
            *flags,
        )
        windows = self._windows(question, text, fields)
        if len(windows) > self._most_windows:
            raise RequestError(
                f"'context' is read in {len(windows)} windows, one request takes at most {self._most_windows}: send it "
                "in parts, or raise max_items (handler key)",
                "context",
            )
        is_one = "top_k" not in fields

        def finish(done: Sequence[Done]) -> Any:
            answers = self._answers(text, windows, done, asked)
            return answers[0] if is_one else answers

        return Work([partial(self._inputs, window) for window in windows], finish, lambda _: "context")

    def _windows(self, question: str, text: str, fields: Mapping[str, Any]) -> list[Any]:
        """tokenizers' encoding of each."""
        longest = count_field(fields, "max_seq_len", self._reader.longest) or min(_WINDOW, self._reader.longest)
        stride = count_field(fields, "doc_stride", least=0)
        stride = min(longest // 2, _STRIDE) if stride is None else stride
        pair = (question, text) if self._text else (text, question)
        only = "only_second" if self._text else "only_first"
        with self._cuts_one:
            beside = len(self._tokenizer(question, "", truncation=False)["input_ids"])
            if beside + stride >= longest:
                raise RequestError(
                    f"the question has {beside} tokens: with the {stride} of doc_stride it must have fewer than "
                    f"max_seq_len, which is {longest}",
                    "question",
                )
            cut = {"truncation": only, "max_length": longest, "stride": stride, "return_overflowing_tokens": True}
            windows: list[Any] = self._tokenizer(*pair, **cut).encodings
        return windows

    def _inputs(self, window: Any) -> Inputs:
        return self._reader.made_of(window.ids, window.type_ids, "context")

    def _answers(self, text: str, windows: Sequence[Any], done: Sequence[Done], asked: Asked) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        none = 1.0
        for window, own in zip(windows, done, strict=True):
            starts, ends = self._probabilities(window, own.output)
            none = min(none, float(starts[0] * ends[0]))
            for score, first, last in self._spans(window, starts, ends, asked):
                start, end = self._place(window, first, last, asked.keeps_words)
                words = text[start:end]
                answer = {"score": 0.0, "start": start, "end": end, "answer": words}
                found.setdefault(words.lower(), answer)["score"] += score
        answers = list(found.values())
        if asked.may_be_none or not answers:
            answers.append({"score": none, "start": 0, "end": 0, "answer": ""})
        return sorted(answers, key=lambda answer: -answer["score"])[: asked.num_answers]

    def _may_answer(self, window: Any) -> torch.Tensor:
        """Of each token, whether an answer may begin or end with it: the text's, and the one that says "none"."""
        of_text = torch.tensor([number == self._text for number in window.sequence_ids])
        return of_text | (torch.tensor(window.ids) == self._none_id)

    @property
    def _none_id(self) -> int:
        token: int | None = self._tokenizer.cls_token_id
        return -1 if token is None else token

    def _probabilities(self, window: Any, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        may = self._may_answer(window)
        starts, ends = output.float().masked_fill(~may.unsqueeze(-1), float("-inf")).softmax(dim=0).unbind(-1)
        return starts.nan_to_num(0.0), ends.nan_to_num(0.0)

    def _spans(
        self, window: Any, starts: torch.Tensor, ends: torch.Tensor, asked: Asked
    ) -> list[tuple[float, int, int]]:
        """Score, first and last token of the best ones; more than are wanted, for some are the same in words."""
        may = self._may_answer(window)
        may[0] = False  # where the one stands that says there is none
        scores = starts.unsqueeze(1) * ends.unsqueeze(0)
        are_spans = torch.ones_like(scores, dtype=torch.bool).triu().tril(asked.longest - 1)
        are_spans &= may.unsqueeze(1) & may.unsqueeze(0)
        most = 2 * asked.num_answers + 10 if asked.keeps_words else asked.num_answers
        best = scores.masked_fill(~are_spans, -1.0).flatten().topk(min(most, scores.numel()))
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        return [(score, *divmod(index, len(starts))) for score, index in pairs if score >= 0]

    def _place(self, window: Any, first: int, last: int, keeps_words: bool) -> tuple[int, int]:
        """Where in the text a span begins and ends."""
        if keeps_words:
            words = window.token_to_word(first), window.token_to_word(last)
            places = [None if word is None else window.word_to_chars(word, self._text) for word in words]
            if places[0] is not None and places[1] is not None:
                return places[0][0], places[1][1]
        return window.offsets[first][0], window.offsets[last][1]


def _text(fields: Mapping[str, Any], name: str) -> str:
    text = fields.get(name)
    if not isinstance(text, str):
        raise RequestError(f"{name!r} must be a text, got {echo(text)}", name)
    if not text.strip():
        raise RequestError(f"{name!r} is empty", name)
    return text


def _flag(fields: Mapping[str, Any], name: str, usual: bool) -> bool:
    value = fields.get(name, usual)
    if not isinstance(value, bool):
        raise RequestError(f"{name!r} must be true or false, got {echo(value)}", name)
    return value
