"""A tokenizer as llguidance wants it: the bytes of each token, and how a text is written.

llguidance's own reading of a tokenizer.json takes each added token for one that makes no text, and then has a form's
text written with it. Here a token makes the text that an answer shows of it: a special one none, so that its name is
written letter by letter; another added one its own, so that the model may write it either way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

from ts_parallel.serving.text.token_texts import TokenTexts


class FormVocabulary:
    """What `llguidance.TokenizerWrapper` asks for. Owns a tokenizer that knows no special token.

    Where a form leaves one text only, that is written as the tokenizer would. What comes of it is compared: a
    normalizer may make another text of it, which is then written with the longest tokens there are.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Any, num_tokens: int, eos_id: int) -> None:
        """
        Args:
            num_tokens: of the model: those that only the tokenizer knows are never allowed.

        Raises:
            ValueError: what its tokens stand for cannot be told, each by itself.
        """
        texts = TokenTexts(tokenizer)
        if not texts.knows_bytes:
            raise ValueError("its tokens stand for no bytes")
        self.eos_token_id = eos_id
        known = range(min(num_tokens, max(tokenizer.get_vocab().values()) + 1))
        self.special_token_ids: Sequence[int] = sorted(texts.special_ids & set(known))
        self._bytes = [texts.bytes_of(token_id) or b"" for token_id in known]
        names = {token_id: tokenizer.convert_ids_to_tokens(token_id).encode() for token_id in self.special_token_ids}
        self.tokens: Sequence[bytes] = [names.get(token_id, own) for token_id, own in enumerate(self._bytes)]
        self._id_of = {own: token_id for token_id, own in enumerate(self._bytes) if own}
        self._longest = max(map(len, self._id_of), default=0)
        backend = tokenizer.backend_tokenizer
        shown = {
            token_id: own
            for token_id, own in backend.get_added_tokens_decoder().items()
            if not (own.special or own.lstrip or own.rstrip)
        }
        self._plain = _plain(backend, list(shown.values()))
        # It numbers added tokens anew, where some are left out.
        self._own_id = {self._plain.token_to_id(own.content): token_id for token_id, own in shown.items()}

    def __call__(self, text: str) -> list[int]:
        """Tokens whose bytes are those of the text, if there are such."""
        wanted = text.encode()
        encoded: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        ids = [self._own_id.get(token_id, token_id) for token_id in encoded]
        is_text = all(token_id < len(self._bytes) for token_id in ids)
        return ids if is_text and b"".join(self._bytes[own] for own in ids) == wanted else self._longest_first(wanted)

    def _longest_first(self, text: bytes) -> list[int]:
        ids, at = list[int](), 0
        while at < len(text):
            sizes = range(min(self._longest, len(text) - at), 0, -1)
            size = next((size for size in sizes if text[at : at + size] in self._id_of), 0)
            if not size:  # a byte that the model has no token for
                break
            ids.append(self._id_of[text[at : at + size]])
            at += size
        return ids


def _plain(backend: Tokenizer, added: list[AddedToken]) -> Tokenizer:
    """One that adds nothing to a text, and finds these added tokens in it. It shares the vocabulary: to write that out
    and read it again takes seconds, in which no other thread goes on."""
    steps = Tokenizer(models.BPE())
    steps.normalizer, steps.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    settings = json.loads(steps.to_str())
    for name in ("normalizer", "pre_tokenizer"):
        settings[name] = _without_first_space(settings[name])
    steps = Tokenizer.from_str(json.dumps(settings))
    own = Tokenizer(backend.model)
    own.normalizer, own.pre_tokenizer = steps.normalizer, steps.pre_tokenizer
    own.add_tokens(added)
    return own


def _without_first_space(step: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Sequence":
        name = "normalizers" if "normalizers" in step else "pretokenizers"
        return {**step, name: [own for own in map(_without_first_space, step[name]) if own is not None]}
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    return {**step, "add_prefix_space": False} if "add_prefix_space" in step else dict(step)
