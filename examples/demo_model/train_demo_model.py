"""Train the demo model: a small Llama on the docstrings of the Python standard library.

    python examples/demo_model/train_demo_model.py --output examples/demo_model --minutes 15

Writes what a Hugging Face trainer would: config.json, generation_config.json, model.safetensors (bfloat16, below 4 MB)
and a byte-level BPE tokenizer trained on the same text. One in fifty docstrings is held out; its loss is printed.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import math
import random
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 2048
SEQUENCE_LENGTH = 256
BATCH_SIZE = 16
PEAK_LEARNING_RATE = 3e-3
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "ensurepip", "pydoc_data"}


def docstrings() -> list[str]:
    """Every docstring of the standard library that holds a sentence, cleaned of its indentation, in a stable order."""
    found: dict[str, None] = {}
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text and len(text) >= 30:
                    found[inspect.cleandoc(text)] = None
    return list(found)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=160,
        intermediate_size=400,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one row of token ids, each between its begin and end marks."""
    ids: list[int] = []
    for encoding in tokenizer(texts).input_ids:
        ids += [*encoding, tokenizer.eos_token_id]
    return torch.tensor(ids)


def batch_of(stream: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(len(stream) - SEQUENCE_LENGTH, (BATCH_SIZE,), generator=generator)
    return torch.stack([stream[start : start + SEQUENCE_LENGTH] for start in starts.tolist()])


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: torch.Tensor) -> float:
    """Mean cross entropy in nats a token over the held-out stream."""
    windows = stream[: len(stream) // SEQUENCE_LENGTH * SEQUENCE_LENGTH].view(-1, SEQUENCE_LENGTH)
    losses = [model(input_ids=part, labels=part).loss.item() for part in windows.split(BATCH_SIZE)]
    return sum(losses) / len(losses)


def train(model: LlamaForCausalLM, stream: torch.Tensor, held_out: torch.Tensor, seconds: float) -> None:
    """AdamW with warm-up and a cosine over wall time, so that the schedule ends when the time does."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    start, step = time.perf_counter(), 0
    while (progress := (time.perf_counter() - start) / seconds) < 1:
        rate = PEAK_LEARNING_RATE * min((step + 1) / 100, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = batch_of(stream, generator)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {progress:.0%} of the time", flush=True)
        step += 1
    print(f"{step} steps, held-out loss {held_out_loss(model, held_out):.3f} nats a token", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    texts = docstrings()
    random.Random(0).shuffle(texts)
    kept_back, texts = texts[::50], [text for index, text in enumerate(texts) if index % 50]
    tokenizer = train_tokenizer(texts)
    stream, held_out = token_stream(tokenizer, texts), token_stream(tokenizer, kept_back)
    print(f"{len(texts)} docstrings, {len(stream)} tokens; {len(held_out)} tokens held out", flush=True)
    model = new_model(tokenizer)
    train(model, stream, held_out, arguments.minutes * 60)
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
