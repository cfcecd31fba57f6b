"""Small tokenizers of every kind that chat models have, trained here on a few lines of text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_TEXT = """the list has the token that the model wants, and the prompt is a text
a token of the text is a word with the space before it: the one, the two, the three
return a new list containing the answer; def f(self, x): return x + 1
    tokens = [token for token in tokens if token]
when the prompt ends the answer begins, and then it goes on word by word until it ends here"""
_NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
_MARKS = (AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True))
_TOOL_MARK = AddedToken("<tool_call>", special=False, normalized=False)


def _finished(own: Tokenizer, **named: str) -> Any:
    """With the added tokens that chat models have, of which the last is no special one."""
    own.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", own.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, **_NAMED, **named)
    tokenizer.add_tokens([*_MARKS, _TOOL_MARK])
    return tokenizer


def _bytes_and_words(size: int) -> Tokenizer:
    """A byte pair encoding with a token for each byte that no other makes, words beginning with an underline."""
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    own = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    own.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    own.train_from_iterator(_TEXT.splitlines(), trainers.BpeTrainer(vocab_size=size, special_tokens=first))
    own.pre_tokenizer = None
    # A trainer calls all of `first` special, which bytes are not.
    trained = own.model
    own = Tokenizer(trained)
    own.add_special_tokens(first[:3])
    return own


def legacy_sentencepiece(size: int = 600) -> Any:
    """As Llama 2's, Mistral 7B's and Phi-3's: spaces are written by a normalizer, and by the decoder taken back."""
    own = _bytes_and_words(size)
    own.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    own.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finished(own, unk_token="<unk>")


def metaspace(size: int = 600) -> Any:
    """As SentencePiece's are converted today: only a text's first word gets a space."""
    own = _bytes_and_words(size)
    own.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    own.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=False), decoders.Fuse()]
    )
    return _finished(own, unk_token="<unk>")


def byte_level(size: int = 600) -> Any:
    """As GPT-2's, Qwen's and Llama 3's: a letter for each byte."""
    own = Tokenizer(models.BPE())
    own.normalizer = normalizers.NFC()
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    own.train_from_iterator(_TEXT.splitlines(), trainer)
    return _finished(own)


KINDS: dict[str, Callable[[], Any]] = {
    "legacy sentencepiece": legacy_sentencepiece,
    "metaspace": metaspace,
    "byte level": byte_level,
}
