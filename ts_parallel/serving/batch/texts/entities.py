"""Labels of tokens, and the entities that they make, grouped as transformers' pipeline for tokens groups them.

    none      each token by itself
    simple    neighbours of one tag, unless the next begins a new one (B-)
    first     … whose words have the label of their first token
    average   … or the one that is the likeliest on average over their tokens
    max       … or that of their surest token

A score is a probability, a group's the mean of its tokens' or words'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PretrainedConfig

from ts_parallel.errors import RequestError
from ts_parallel.serving.batch.jobs import Done, Inputs, Work, choice, known_fields, within_most
from ts_parallel.serving.batch.texts.reading import TextReader
from ts_parallel.serving.exchange import RawRequest, echo

STRATEGIES = ("none", "simple", "first", "average", "max")
_OF_WORDS = STRATEGIES[2:]
FIELDS = ("text", "input", "model", "user", "aggregation_strategy", "ignore_labels")


@dataclass(frozen=True)
class Token:
    """A token of a text that is no special one, or a word of several."""

    index: int
    """Among all of the text's tokens."""
    word: str
    place: tuple[int, int] | None
    """Where in the text it begins and ends; None where the tokenizer does not know."""
    goes_on: bool
    """Whether it belongs to the word of the token before."""
    scores: torch.Tensor
    """`[labels]`, of each its probability."""


class EntityApi:
    """One text's entities, or those of each of several."""

    def __init__(self, reader: TextReader, config: PretrainedConfig, most_items: int) -> None:
        self._reader = reader
        self._names: dict[int, str] = config.id2label or {}
        self._most_items = most_items

    def open(self, item: RawRequest) -> Work:
        """
        Raises:
            RequestError: the body has no text, too many, or a field that is unknown or out of its limits.
        """
        raw = item.text()
        fields = known_fields(item, FIELDS) if raw is None else {"text": raw}
        strategy = choice(fields, "aggregation_strategy", STRATEGIES)
        if strategy in _OF_WORDS and not self._reader.tokenizer.is_fast:
            raise RequestError(
                f"'aggregation_strategy' {strategy!r} needs words, which this tokenizer knows not; 'simple' needs none",
                "aggregation_strategy",
            )
        ignored = fields.get("ignore_labels", ["O"])
        if not isinstance(ignored, list) or not all(isinstance(label, str) for label in ignored):
            raise RequestError(f"'ignore_labels' must be a list of labels, got {echo(ignored)}", "ignore_labels")
        texts, is_one = self._texts_of(fields)
        encoded: list[Any] = [None] * len(texts)

        def read(index: int) -> Inputs:
            encoded[index] = self._reader.with_offsets(texts[index])
            return self._reader.read_ids(encoded[index]["input_ids"])

        def finish(done: Sequence[Done]) -> Any:
            found = [
                self._entities(self._tokens(text, own, output.output), strategy, ignored)
                for text, own, output in zip(texts, encoded, done, strict=True)
            ]
            return found[0] if is_one else found

        return Work([partial(read, index) for index in range(len(texts))], finish)

    def _texts_of(self, fields: dict[str, Any]) -> tuple[list[str], bool]:
        """The texts, and whether the answer is that of one alone."""
        name = "input" if "input" in fields else "text"
        given = fields.get(name)
        is_list = name == "input" and isinstance(given, list)
        texts: list[Any] = given if is_list else [given]  # type: ignore[assignment]
        if not all(isinstance(text, str) for text in texts):
            raise RequestError(f"{name!r} must be a text, got {echo(given)}", name)
        within_most(texts, name, self._most_items)
        return texts, not is_list

    def _tokens(self, text: str, encoded: Any, logits: torch.Tensor) -> list[Token]:
        tokenizer, tokens = self._reader.tokenizer, []
        backend = getattr(tokenizer, "backend_tokenizer", None)
        knows_words = bool(getattr(getattr(backend, "model", None), "continuing_subword_prefix", None))
        places = encoded.get("offset_mapping")
        probabilities = logits.float().softmax(-1)
        for index, token_id in enumerate(encoded["input_ids"]):
            if encoded["special_tokens_mask"][index]:
                continue
            word, place, goes_on = tokenizer.convert_ids_to_tokens(token_id), None, False
            if places is not None:
                begin, end = place = tuple(places[index])
                own = text[begin:end]
                # A token inside a word is written with a mark before it; without marks, no space before it tells.
                goes_on = len(word) != len(own) if knows_words else begin > 0 and " " not in text[begin - 1 : begin + 1]
                if token_id == tokenizer.unk_token_id:
                    word, goes_on = own, False
            tokens.append(Token(index, word, place, goes_on, probabilities[index]))
        return tokens

    def _entities(self, tokens: list[Token], strategy: str, ignored: Sequence[str]) -> list[dict[str, Any]]:
        if strategy == "none":
            single = [self._single(token) for token in tokens]
            return [entity for entity in single if entity["entity"] not in ignored]
        if strategy in _OF_WORDS:
            tokens = [self._word(word, _CHOOSE[strategy]) for word in _runs(tokens, lambda _, token: token.goes_on)]
        groups = [self._group(group) for group in _runs(tokens, self._belong_together)]
        return [entity for entity in groups if entity["entity_group"] not in ignored]

    def _single(self, token: Token) -> dict[str, Any]:
        found = {"entity": self._label(token), "score": float(token.scores.max()), "index": token.index}
        return {**found, "word": token.word, **_between(token, token)}

    def _group(self, tokens: Sequence[Token]) -> dict[str, Any]:
        score = sum(float(token.scores.max()) for token in tokens) / len(tokens)
        word = self._reader.tokenizer.convert_tokens_to_string([token.word for token in tokens])
        group = self._label(tokens[0]).split("-", 1)[-1]
        return {"entity_group": group, "score": score, "word": word, **_between(tokens[0], tokens[-1])}

    def _word(self, tokens: Sequence[Token], choose: Callable[[Sequence[Token]], torch.Tensor]) -> Token:
        word = self._reader.tokenizer.convert_tokens_to_string([token.word for token in tokens])
        first, last = tokens[0], tokens[-1]
        place = (first.place[0], last.place[1]) if first.place and last.place else None
        return Token(first.index, word, place, False, choose(tokens))

    def _label(self, token: Token) -> str:
        index = int(token.scores.argmax())
        return self._names.get(index, f"LABEL_{index}")

    def _belong_together(self, before: Token, token: Token) -> bool:
        own = self._label(token)
        return not own.startswith("B-") and _tag(own) == _tag(self._label(before))


_CHOOSE: dict[str, Callable[[Sequence[Token]], torch.Tensor]] = {
    "first": lambda tokens: tokens[0].scores,
    "average": lambda tokens: torch.stack([token.scores for token in tokens]).mean(dim=0),
    "max": lambda tokens: max(tokens, key=lambda token: float(token.scores.max())).scores,
}


def _runs(tokens: Sequence[Token], goes_on: Callable[[Token, Token], bool]) -> list[list[Token]]:
    """The tokens in runs, each as long as the next one goes on."""
    runs: list[list[Token]] = []
    for token in tokens:
        if runs and goes_on(runs[-1][-1], token):
            runs[-1].append(token)
        else:
            runs.append([token])
    return runs


def _tag(label: str) -> str:
    return label[2:] if label.startswith(("B-", "I-")) else label


def _between(first: Token, last: Token) -> dict[str, int | None]:
    return {"start": first.place and first.place[0], "end": last.place and last.place[1]}
