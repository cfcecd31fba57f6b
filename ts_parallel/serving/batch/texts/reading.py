"""Texts, pairs of texts and token ids → a model's inputs, with the tokenizer, the limits and the prompts of its folder.

A folder of sentence-transformers says where its texts are cut and what stands before them; any other cuts none that the
request does not ask to be cut.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers.normalizers import Lowercase
from tokenizers.normalizers import Sequence as Normalizers
from transformers import PretrainedConfig

from ts_parallel.errors import CheckpointError, RequestError
from ts_parallel.partition.model.encoder import POOLED, SEGMENTS, ModelCall
from ts_parallel.partition.model.sentence_modules import read_json, sentence_folder
from ts_parallel.serving.batch.jobs import count_field
from ts_parallel.serving.batch.micro_batching import Collator
from ts_parallel.serving.batch.texts.padding import bears_padding
from ts_parallel.serving.text.model_files import read_tokenizer, vocabulary_of

SETTINGS = ("add_special_tokens", "truncate_prompt_tokens")
"""Fields of every body of texts that say how they become tokens."""
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
# Of sentence_bert_config.json, and what they may be where nothing is done for them; None: anything.
_NEUTRAL: Mapping[str, tuple[Any, ...] | None] = {
    "transformer_task": ("feature-extraction", "sequence-classification"),
    "modality_config": None,
    "module_output_name": ("token_embeddings", "scores", None),
    "unpad_inputs": None,
    "query_length": (None,),
    "document_length": (None,),
    "query_expansion": (None,),
    "processing_kwargs": (None, {}),
    "model_args": (None, {}),
    "tokenizer_args": (None, {}),
    "config_args": (None, {}),
    "model_kwargs": (None, {}),
    "processor_kwargs": (None, {}),
    "config_kwargs": (None, {}),
    "tokenizer_name_or_path": (None,),
}


@dataclass(frozen=True)
class TextRules:
    """What a folder of sentence-transformers says of its texts."""

    is_cut: bool = False
    """Whether a text that is too long is cut."""
    longest: int | None = None
    """The most tokens of a text; None: as many as tokenizer and model take."""
    lowers_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    prompt: str = ""
    """The one that stands before a text where a request names none."""
    dimensions: int | None = None
    """How many of a vector's numbers are its answer; None: all."""
    similarity: str = SIMILARITIES[0]
    """By which two vectors are compared."""


def read_text_rules(folder: Path, is_cut: bool) -> TextRules:
    """
    Args:
        is_cut: whether texts are cut that are too long, where the folder is one of sentence-transformers.

    Raises:
        CheckpointError: a file cannot be read, or has a setting that cannot be served.
    """
    home = sentence_folder(folder)
    of_library, of_texts = home / "config_sentence_transformers.json", sorted(folder.glob("sentence_*_config.json"))
    if not (of_texts or of_library.is_file() or (home / "modules.json").is_file()):
        return TextRules()
    own = read_json(of_texts[0]) if of_texts else {}
    for name, value in own.items():
        idle = _NEUTRAL.get(name, ())
        if name not in ("max_seq_length", "do_lower_case") and idle is not None and value not in idle:
            raise CheckpointError(f"{of_texts[0]}: {name} {value!r} cannot be served")
    settings = read_json(of_library) if of_library.is_file() else {}
    prompts = {"query": "", "document": "", **(settings.get("prompts") or {})}
    default = settings.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise CheckpointError(f"{of_library}: default_prompt_name {default!r} is none of its prompts {sorted(prompts)}")
    similarity = settings.get("similarity_fn_name") or SIMILARITIES[0]
    if similarity not in SIMILARITIES:
        raise CheckpointError(
            f"{of_library}: similarity_fn_name {similarity!r} cannot be served; {list(SIMILARITIES)} can"
        )
    return TextRules(
        is_cut,
        own.get("max_seq_length"),
        bool(own.get("do_lower_case")),
        prompts,
        prompts[default] if default else "",
        settings.get("truncate_dim"),
        similarity,
    )


@dataclass(frozen=True)
class Asked:
    """How a request wants its texts to become tokens."""

    adds_special_tokens: bool = True
    longest: int | None = None
    """The most tokens of a text, which is cut to them; None: as the folder says."""
    prompt: str | None = None
    """What is to stand before each text; None: what the folder says."""


class TextReader:
    """Owns the tokenizer. Called from several threads at once."""

    def __init__(self, folder: Path, call: ModelCall, config: PretrainedConfig, rules: TextRules) -> None:
        """
        Raises:
            CheckpointError: the folder has no tokenizer that can be used.
        """
        self._tokenizer = read_tokenizer(folder)
        self._vocabulary = vocabulary_of(config, self._tokenizer)
        self._names = tuple(call.inputs)
        self._bears_padding = bears_padding(config)
        self.rules = rules
        self.longest = min(rules.longest or self._tokenizer.model_max_length, call.limits["S"])
        """The most tokens of a text."""
        if rules.lowers_case:
            _lower_case(self._tokenizer)
        self._tokenizer("a")  # what tokenizer.json says of cutting and padding is undone here, before threads share it
        self._cutter, self._cuts_one = copy.deepcopy(self._tokenizer), threading.Lock()

    def asked(self, fields: Mapping[str, Any]) -> Asked:
        """
        Raises:
            RequestError: one of the fields `SETTINGS` has a value that it cannot have.
        """
        special = fields.get("add_special_tokens", True)
        if not isinstance(special, bool):
            raise RequestError(f"'add_special_tokens' must be true or false, got {special!r}", "add_special_tokens")
        if fields.get("truncate_prompt_tokens") == -1:
            return Asked(special, self.longest)
        return Asked(special, count_field(fields, "truncate_prompt_tokens", self.longest))

    def read(self, text: str, pair: str | None = None, asked: Asked | None = None) -> dict[str, torch.Tensor]:
        """Int64 `[S]` each; of a pair of texts one sequence.

        Raises:
            RequestError: the text is empty, or has more tokens than the model takes, or one that the model has not.
        """
        asked = asked or Asked()
        prompt = self.rules.prompt if asked.prompt is None else asked.prompt
        encoded = self._encode(prompt + text, pair, asked)
        inputs = self._inputs(encoded["input_ids"], encoded.get(SEGMENTS), "text")
        if POOLED in self._names and prompt:
            inputs[POOLED][: self._num_tokens_of_prompt(prompt, asked)] = 0
        return inputs

    def read_ids(self, token_ids: Sequence[Any], asked: Asked | None = None) -> dict[str, torch.Tensor]:
        """As they are: nothing is added to them.

        Raises:
            RequestError: there is none, or more than the model takes, or one that the model has not.
        """
        asked = asked or Asked()
        if asked.prompt:
            raise RequestError("a prompt stands before texts, not before token ids", "prompt")
        longest = asked.longest or (self.longest if self.rules.is_cut else len(token_ids))
        return self._inputs(list(token_ids)[:longest], None, "input")

    def made_of(self, token_ids: Sequence[int], segments: Sequence[int], parameter: str) -> dict[str, torch.Tensor]:
        """Of a sequence that somebody else has made by `tokenizer`.

        Args:
            parameter: what the request calls it.

        Raises:
            RequestError: there are too many tokens, or one that the model has not.
        """
        return self._inputs(token_ids, segments, parameter)

    def collator(self, trims_by: str | None = None) -> Collator:
        """Fills shorter texts up on the right, with what the attention mask leaves out; where a model would give a text
        another output for that, only texts of one length come together."""
        padding = dict.fromkeys(self._names, 0) | {"input_ids": self._tokenizer.pad_token_id or 0}
        return Collator(padding if self._bears_padding else None, trims_by)

    def with_offsets(self, text: str) -> Any:
        """The tokenizer's whole encoding of a text, with each token's place, if it is known, and which are special."""
        knows_places = bool(self._tokenizer.is_fast)
        return self._tokenizer(text, return_offsets_mapping=knows_places, return_special_tokens_mask=True)

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    def _encode(self, text: str, pair: str | None, asked: Asked) -> Any:
        encoded = self._tokenizer(text, pair, add_special_tokens=asked.adds_special_tokens)
        longest = asked.longest or (self.longest if self.rules.is_cut else None)
        if longest is None or len(encoded["input_ids"]) <= longest:
            return encoded
        # To be told a length changes a fast tokenizer for all who use it.
        cut = {"truncation": "longest_first", "max_length": longest}
        with self._cuts_one:
            return self._cutter(text, pair, add_special_tokens=asked.adds_special_tokens, **cut)

    def _inputs(self, token_ids: Sequence[Any], segments: Any, parameter: str) -> dict[str, torch.Tensor]:
        if not token_ids:
            raise RequestError("the text is empty", parameter)
        if len(token_ids) > self.longest:
            raise RequestError(
                f"the text has {len(token_ids)} tokens, the model takes at most {self.longest}; "
                "truncate_prompt_tokens -1 cuts it",
                parameter,
            )
        ids = torch.tensor(self._vocabulary.known(token_ids, parameter))
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), POOLED: torch.ones_like(ids)}
        made[SEGMENTS] = torch.zeros_like(ids) if segments is None else torch.tensor(segments)
        return {name: made[name] for name in self._names if name in made}

    def _num_tokens_of_prompt(self, prompt: str, asked: Asked) -> int:
        """Without a last one that ends texts."""
        ids: list[int] = self._encode(prompt, None, asked)["input_ids"]
        return len(ids) - (bool(ids) and ids[-1] in self._tokenizer.all_special_ids)


def _lower_case(tokenizer: Any) -> None:
    """Before all else that a fast tokenizer makes of a text."""
    backend = tokenizer.backend_tokenizer
    own = backend.normalizer
    steps = [*own] if isinstance(own, Normalizers) else [own] if own is not None else []  # type: ignore[misc]
    if not any(isinstance(step, Lowercase) for step in steps):
        backend.normalizer = Normalizers([Lowercase(), *steps])
