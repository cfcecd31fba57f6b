"""A Whisper with random weights, its tokenizer and its feature extractor, and sounds for it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from tokenizers import AddedToken, pre_tokenizers
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

SECONDS = 1
"""Of a window."""
FRAMES, MEL_BINS = 100 * SECONDS, 8
LANGUAGES = ("en", "de", "fr")
_SPECIAL = (
    *("<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in LANGUAGES)),
    *("<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"),
)


def make_tokenizer() -> WhisperTokenizer:
    """Letters alone; then the special tokens, and behind them the timestamps, which are no special ones."""
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = WhisperTokenizer(vocab=letters, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(_SPECIAL)})
    times = [f"<|{0.02 * step:.2f}|>" for step in range(FRAMES // 2 + 1)]
    tokenizer.add_tokens([AddedToken(time, special=False, normalized=False) for time in times])
    return tokenizer


def save_whisper(folder: Path, **generation: Any) -> WhisperForConditionalGeneration:
    """One whose answers vary, and whose timestamps come now and then."""
    tokenizer = make_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in _SPECIAL}
    end = ids["<|endoftext|>"]
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    special = {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end}
    special["decoder_start_token_id"] = ids["<|startoftranscript|>"]
    config = WhisperConfig(
        **{**sizes, **special, "vocab_size": len(tokenizer), "num_mel_bins": MEL_BINS, "max_target_positions": 40},
        **{"max_source_positions": FRAMES // 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    )
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            is_embedding = parameter is model.get_input_embeddings().weight
            parameter.add_(torch.randn_like(parameter), alpha=0.1 if is_embedding else 0.4)
    settings: dict[str, Any] = {
        **{"no_timestamps_token_id": ids["<|notimestamps|>"], "prev_sot_token_id": ids["<|startofprev|>"]},
        **{"lang_to_id": {f"<|{code}|>": ids[f"<|{code}|>"] for code in LANGUAGES}, "is_multilingual": True},
        **{"task_to_id": {name: ids[f"<|{name}|>"] for name in ("transcribe", "translate")}, "max_length": 40},
        **{"suppress_tokens": [5, ids["<|startofprev|>"], ids["<|nospeech|>"]], "begin_suppress_tokens": [end, 20]},
        **{"max_initial_timestamp_index": 10, "return_timestamps": False, "repetition_penalty": 1.2},
    }
    model.generation_config = GenerationConfig(**special, **{**settings, **generation})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=MEL_BINS, chunk_length=SECONDS).save_pretrained(folder)
    return model


def sound(seconds: float, seed: int = 0, rate: int = 16000) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Tones that come and go, with some noise."""
    random = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    tones = sum(np.sin(2 * np.pi * pitch * time) for pitch in random.uniform(100, 3000, 4))
    samples = 0.1 * tones * (1 + np.sin(3 * time)) + 0.02 * random.standard_normal(len(time))
    return samples.astype(np.float32)


def file_of(samples: Any, rate: int, form: str, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form, subtype=subtype)
    return file.getvalue()
