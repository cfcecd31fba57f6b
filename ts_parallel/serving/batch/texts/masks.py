"""What a text's masks may stand for: the likeliest tokens, as transformers' pipeline for masks gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ts_parallel.errors import CheckpointError, RequestError
from ts_parallel.partition.model.encoder import MASKED
from ts_parallel.serving.batch.jobs import Done, Inputs, Work, count_field, known_fields, within_most
from ts_parallel.serving.batch.micro_batching import Collator
from ts_parallel.serving.batch.texts.reading import TextReader
from ts_parallel.serving.exchange import RawRequest, echo

FIELDS = ("text", "input", "top_k", "targets", "model", "user")
_USUAL, _MOST = 5, 100  # tokens of each mask


class MaskApi:
    """`[M, V]` of a text with M masks → so many tokens for each; of several texts a list."""

    def __init__(self, reader: TextReader, most_items: int) -> None:
        """
        Raises:
            CheckpointError: the tokenizer has no mask.
        """
        if reader.tokenizer.mask_token_id is None:
            raise CheckpointError("fill_mask needs a tokenizer with a mask_token: this folder's has none")
        self._reader = reader
        self._mask: int = reader.tokenizer.mask_token_id
        self._most_items = most_items

    def open(self, item: RawRequest) -> Work:
        """
        Raises:
            RequestError: the body has no text, too many, or a field that is unknown or out of its limits.
        """
        raw = item.text()
        fields = known_fields(item, FIELDS) if raw is None else {"text": raw}
        name = "input" if "input" in fields else "text"
        given = fields.get(name)
        texts: list[Any] = given if isinstance(given, list) and name == "input" else [given]
        if not all(isinstance(text, str) for text in texts):
            raise RequestError(f"{name!r} must be a text, got {echo(given)}", name)
        within_most(texts, name, self._most_items)
        most = count_field(fields, "top_k", _MOST) or _USUAL
        targets = self._targets(fields)

        def finish(done: Sequence[Done]) -> Any:
            found = [self._filled(own, most, targets) for own in done]
            return found if texts is given else found[0]

        return Work([partial(self.read, text) for text in texts], finish)

    def read(self, text: str) -> dict[str, torch.Tensor]:
        """
        Raises:
            RequestError: it has no mask, or more tokens than the model takes.
        """
        return self.marked(self._reader.read(text))

    def marked(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """A text's inputs with the places of its masks.

        Raises:
            RequestError: it has none.
        """
        places = (inputs["input_ids"] == self._mask).nonzero().squeeze(-1)
        if not len(places):
            raise RequestError(f"the text has no mask, which is {self._reader.tokenizer.mask_token!r}", "text")
        return {**inputs, MASKED: places}

    def collator(self) -> Collator:
        padding = self._reader.collator().padding
        return Collator(None if padding is None else {**padding, MASKED: 0}, trims_by=MASKED)

    def _targets(self, fields: Mapping[str, Any]) -> list[int] | None:
        """Token ids to choose among; None: all."""
        given = fields.get("targets")
        if given is None:
            return None
        targets = [given] if isinstance(given, str) else given
        if not isinstance(targets, list) or not targets or not all(isinstance(own, str) for own in targets):
            raise RequestError(f"'targets' must be a text or a list of texts, got {echo(given)}", "targets")
        tokenizer = self._reader.tokenizer
        vocabulary = tokenizer.get_vocab()
        found: list[int] = []
        for own in targets:
            ids = [vocabulary[own]] if own in vocabulary else tokenizer(own, add_special_tokens=False)["input_ids"]
            if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
                raise RequestError(f"'targets' has {own!r}, which is {len(ids)} tokens or an unknown one", "targets")
            found += ids
        return list(dict.fromkeys(found))

    def _filled(self, done: Done, most: int, targets: list[int] | None) -> Any:
        probabilities = done.output.float().softmax(dim=-1)
        if targets is not None:
            probabilities = probabilities[:, targets]
        best = probabilities.topk(min(most, probabilities.shape[-1]))
        places = done.inputs[MASKED].tolist()
        filled = []
        for place, scores, indices in zip(places, best.values.tolist(), best.indices.tolist(), strict=True):
            tokens = indices if targets is None else [targets[index] for index in indices]
            filled.append([self._one(done, place, *own) for own in zip(tokens, scores, strict=True)])
        return filled[0] if len(filled) == 1 else filled

    def _one(self, done: Done, place: int, token: int, score: float) -> dict[str, Any]:
        tokenizer, ids = self._reader.tokenizer, done.inputs["input_ids"].clone()
        is_alone = len(done.inputs[MASKED]) == 1  # else the others would be lost with the special tokens
        ids[place] = token
        ids = ids[ids != tokenizer.pad_token_id] if tokenizer.pad_token_id is not None else ids
        text = tokenizer.decode(ids, skip_special_tokens=is_alone)
        return {"score": score, "token": token, "token_str": tokenizer.decode([token]), "sequence": text}
