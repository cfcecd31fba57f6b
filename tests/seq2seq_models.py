"""Encoder–decoder checkpoints with random weights, and what plain transformers answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    GenerationConfig,
    PreTrainedModel,
)

VOCABULARY = 96
ENDS = range(60, 68)  # tokens that end an answer, so many that most answers end before they must
MEL_BINS, FRAMES = 8, 40
TEXT, SPEECH = "text2text_generation", "automatic_speech_recognition"
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 1, "decoder_start_token_id": 2}
# Not more decoder layers than encoder layers: the cache of transformers 5.23 would have too few for T5.
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
_BART = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4},
}
# T5's table of biases has as many buckets as there are heads: which of its dims the heads are must be known.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", {**_T5, "relative_attention_num_buckets": 4, "relative_attention_max_distance": 9}),
    "gated t5": ("t5", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bart": ("bart", {**_BART, "max_position_embeddings": 40, "scale_embedding": True, "forced_eos_token_id": 1}),
    "m2m": ("m2m_100", {**_BART, "max_position_embeddings": 40, "scale_embedding": True}),  # NLLB's too
    "whisper": (
        "whisper",
        {**_BART, "num_mel_bins": MEL_BINS, "max_source_positions": FRAMES // 2, "max_target_positions": 30},
    ),
}
# Rules of generation that change what these models answer.
GENERATION: dict[str, dict[str, Any]] = {
    "t5": {"no_repeat_ngram_size": 3},
    "gated t5": {"repetition_penalty": 1.5, "min_length": 4},
    "bart": {"forced_bos_token_id": 3, "no_repeat_ngram_size": 2},
    "m2m": {"forced_bos_token_id": 5},
    "whisper": {
        **{"suppress_tokens": [5, 6, 7, 8, 9], "begin_suppress_tokens": [1, 20], "no_timestamps_token_id": 90},
        **{"lang_to_id": {"<|en|>": 80, "<|de|>": 81, "<|fr|>": 82}, "task_to_id": {"transcribe": 85, "translate": 86}},
        **{"is_multilingual": True, "return_timestamps": False, "repetition_penalty": 1.3},
    },
}


def task_of(name: str) -> str:
    return SPEECH if name == "whisper" else TEXT


def save(folder: Path, name: str, vocabulary: int = VOCABULARY) -> None:
    """A checkpoint to which every tensor matters, and whose answers end sooner or later."""
    model_type, settings = CONFIGS[name]
    config = CONFIG_MAPPING[model_type](**settings, **_SPECIAL, vocab_size=vocabulary)
    torch.manual_seed(0)
    auto = AutoModelForSpeechSeq2Seq if name == "whisper" else AutoModelForSeq2SeqLM
    model: PreTrainedModel = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            is_embedding = parameter is model.get_input_embeddings().weight
            parameter.add_(torch.randn_like(parameter), alpha=0.1 if is_embedding else 0.4)
        if name == "bart":
            model.final_logits_bias.normal_(std=0.5)
    model.generation_config = GenerationConfig(**{**_SPECIAL, "eos_token_id": [1, *ENDS]}, **GENERATION[name])
    if "forced_eos_token_id" in settings:
        model.generation_config.forced_eos_token_id = settings["forced_eos_token_id"]
    model.save_pretrained(folder)


def bodies(name: str, count: int, vocabulary: int = VOCABULARY) -> list[dict[str, Any]]:
    """Requests of unlike lengths, which ask for answers of unlike lengths."""
    generator = torch.Generator().manual_seed(1)
    made: list[dict[str, Any]] = []
    for number in range(count):
        if name == "whisper":
            body: dict[str, Any] = {"input_features": torch.randn(MEL_BINS, FRAMES, generator=generator).tolist()}
            body |= [{}, {"language": "de"}, {"language": "french", "task": "translate"}][number % 3]
        else:
            length = (9, 3, 14, 1, 6)[number % 5]
            body = {"input_ids": torch.randint(4, vocabulary, (length,), generator=generator).tolist()}
        made.append({**body, "max_new_tokens": (12, 5, 18, 9)[number % 4]})
    return made


def plain_answers(folder: Path, name: str, requests: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """The new tokens of each request, asked by itself."""
    auto = AutoModelForSpeechSeq2Seq if name == "whisper" else AutoModelForSeq2SeqLM
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    return [_plain_answer(model, request) for request in requests]


def _plain_answer(model: PreTrainedModel, request: Mapping[str, Any]) -> list[int]:
    arguments = dict(request)
    main = "input_features" if "input_features" in arguments else "input_ids"
    inputs = torch.tensor([arguments.pop(main)])
    if main == "input_ids":
        arguments["attention_mask"] = torch.ones_like(inputs)
    tokens: list[int] = model.generate(inputs, do_sample=False, num_beams=1, **arguments)[0].tolist()
    return tokens if main == "input_features" else tokens[1:]  # Whisper's own `generate` leaves its prompt out
