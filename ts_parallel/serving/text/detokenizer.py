"""Token ids → text, a few at a time, so that the pieces joined are the text of all of them.

A tokenizer gives a text's beginning a treatment of its own: SentencePiece's drops the space before its first word. An
answer is no beginning, it goes on with its prompt. So its text is what `decode` says of prompt and answer together,
without what it says of the prompt.
"""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ts_parallel.serving.text.token_texts import TokenTexts

_INCOMPLETE = "\ufffd"  # what a tokenizer shows for the first bytes of a character whose others are still to come
_FEWEST_OF_A_PROMPT = 8  # tokens before an answer that are decoded along, where they say anything
# What transformers' clean-up takes a space away from: its beginning may still turn out to be one of these.
_CLEANED_UP = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
_MOST_BYTES_OF_A_CHARACTER = 4
_MANY = 5000  # tokens that are decoded at once


@dataclass(frozen=True)
class PromptEnd:
    """The last tokens before an answer, as many as its text depends on, and their own text."""

    token_ids: tuple[int, ...] = ()
    text: str = ""
    """Without the first bytes of a character that the answer is to complete: that one is the answer's."""
    num_incomplete: int = 0
    """How many of the tokens have bytes of that character."""


class Detokenizer:
    """One request's text. Holds back what may still change: a character of which only some bytes are here.

    Only the tokens since the last stable point are decoded, so a step costs the same however long the text is; the
    tokens just before them are decoded along, at first those at the end of the prompt.
    """

    def __init__(self, decoder: TextDecoder, before: PromptEnd | None = None) -> None:
        before = before or PromptEnd()
        self._decoder = decoder
        self._token_ids = list(before.token_ids)
        self._context = 0  # first token that is decoded along
        self._stable = len(before.token_ids) - before.num_incomplete  # first token whose text is not all out yet
        self._known = before.text  # the text of the tokens from the one to the other

    def add(self, token_ids: list[int], is_last: bool) -> str:
        """The text that has become certain. With `is_last`, all of it."""
        self._token_ids += token_ids
        decode = self._decoder.decode
        whole = decode(self._token_ids[self._context :])
        if not is_last and self._decoder.may_change(whole):
            return ""
        if whole.startswith(self._known):
            new = whole[len(self._known) :]
        else:  # bytes that make no character have spoilt those before them, whose text is out
            new = decode(self._token_ids[self._stable :])
        if new:
            self._context, self._stable = self._stable, len(self._token_ids)
            self._known = decode(self._token_ids[self._context :])
        return new


class TextDecoder:
    """A tokenizer's way from tokens to text. Knows no request; may be shared by threads."""

    def __init__(self, tokenizer: Any, skips_special_tokens: bool = True) -> None:
        self.decode = _decode_of(tokenizer, skips_special_tokens)
        self._tokenizer = tokenizer
        self._cleans_up = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))

    def may_change(self, text: str) -> bool:
        """Whether the end of a text may be another once more tokens are there."""
        if text.endswith(_INCOMPLETE):
            return True
        at = text.rfind(" ", -3) if self._cleans_up else -1
        return at >= 0 and any(own.startswith(text[at:]) and own != text[at:] for own in _CLEANED_UP)

    def end_of(self, prompt_ids: Sequence[int], is_kept_whole: bool = False) -> PromptEnd:
        """What an answer to this prompt goes on with.

        So many tokens that they have a text, which takes what is done to a beginning, and that it begins with a whole
        character: bytes that make none spoil all that stand beside them.

        Args:
            is_kept_whole: whether an answer keeps its first space also where the prompt has no text at all.
        """
        num_tokens = min(_FEWEST_OF_A_PROMPT, len(prompt_ids))
        while True:
            end = self._end(list(prompt_ids[len(prompt_ids) - num_tokens :]))
            if end.text and not end.text.startswith(_INCOMPLETE):
                return end
            if num_tokens == len(prompt_ids):
                break
            num_tokens = min(2 * num_tokens, len(prompt_ids))
        if is_kept_whole and not end.text:
            return self._end([*self._tokenizer("a", add_special_tokens=False).input_ids, *prompt_ids])
        return end

    def text_after(self, prompt_ids: Sequence[int], token_ids: list[int]) -> str:
        """That of a whole answer to a prompt."""
        return Detokenizer(self, self.end_of(prompt_ids)).add(token_ids, is_last=True)

    def complete_text(self, token_ids: list[int]) -> str:
        """The text of tokens without the beginning of a character at their end, which the next ones may complete."""
        return self._end(token_ids).text

    def _end(self, token_ids: list[int]) -> PromptEnd:
        text = self.decode(token_ids)
        if not text.endswith(_INCOMPLETE):
            return PromptEnd(tuple(token_ids), text)
        texts = TokenTexts(self._tokenizer)
        raw = [texts.bytes_of(token_id) or b"" for token_id in token_ids[-_MOST_BYTES_OF_A_CHARACTER:]]
        reader = getincrementaldecoder("utf-8")("replace")
        reader.decode(b"".join(raw))
        incomplete, _ = reader.getstate()
        num_whole = 0  # tokens that have no other bytes
        while incomplete and incomplete.endswith(raw[-1]):
            incomplete, num_whole = incomplete.removesuffix(raw.pop()), num_whole + 1
        if num_whole:
            text = self.decode(token_ids[: len(token_ids) - num_whole])
        if incomplete:  # the end of a token that has other letters too
            text = text.removesuffix(_INCOMPLETE)
        return PromptEnd(tuple(token_ids), text, num_whole + bool(incomplete))


def _decode_of(tokenizer: Any, skips_special_tokens: bool) -> Callable[[list[int]], str]:
    """`tokenizer.decode`.

    transformers' own asks of each token in turn what type it is, several times; between two steps of a model that is
    long. Where it would then only hand them on, they go to the tokenizers library at once.
    """
    kind = type(tokenizer)
    hands_on = (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind.decode is PreTrainedTokenizerBase.decode
        and kind._decode is PreTrainedTokenizerFast._decode
        and not tokenizer.clean_up_tokenization_spaces
    )
    decode = tokenizer.backend_tokenizer.decode if hands_on else tokenizer.decode

    def text_of(token_ids: list[int]) -> str:
        if hands_on and len(token_ids) > _MANY:  # of a batch alone it lets other threads go on
            (text,) = tokenizer.backend_tokenizer.decode_batch([token_ids], skip_special_tokens=skips_special_tokens)
            return str(text)
        return str(decode(token_ids, skip_special_tokens=skips_special_tokens))

    return text_of
