"""What quantised weights cost in quality: the perplexity of held-out text with bfloat16, int8 and int4 weights.

    python examples/benchmarks/parts/quantization_quality.py
    python examples/benchmarks/parts/quantization_quality.py --model FOLDER --text FILE

By default the demo model reads the docstrings of this Python's standard library that its training held out. The engine
itself scores them, in windows as long as those of the training, with the log-probabilities of a prompt's own tokens.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from ts_parallel.config import parse_config
from ts_parallel.engine.request import Request
from ts_parallel.errors import TSParallelError
from ts_parallel.serving.causal_lm import load_model, make_engine, make_runner
from ts_parallel.step_plan import SamplingParams
from ts_parallel.topology import open_topology

sys.path.insert(0, str(Path(__file__).parents[2] / "demo_model"))
from train_demo_model import SEQUENCE_LENGTH, docstrings, token_stream

DEMO_MODEL = Path(__file__).parents[2] / "demo_model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="folder of a checkpoint")
    parser.add_argument("--text", type=Path, help="a file to read instead of the docstrings held out")
    arguments = parser.parse_args()

    texts = held_out_docstrings() if arguments.text is None else [arguments.text.read_text(encoding="utf-8")]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
    stream = token_stream(tokenizer, texts)
    windows = [tuple(window.tolist()) for window in torch.split(stream, SEQUENCE_LENGTH) if len(window) > 1]
    print("| weights | MiB | perplexity | beside bfloat16 |\n|---|---:|---:|---:|")
    plain = None
    for quantization in (None, "int8", "int4"):
        num_bytes, found = measure(arguments.model, quantization, windows)
        plain = plain or found
        row = f"{quantization or 'bfloat16'} | {num_bytes / 2**20:.1f} | {found:.2f} | {found / plain - 1:+.2%}"
        print(f"| {row} |", flush=True)


def held_out_docstrings() -> list[str]:
    """As `train_demo_model.py` holds them out."""
    texts = docstrings()
    random.Random(0).shuffle(texts)
    return texts[::50]


def measure(folder: Path, quantization: str | None, windows: list[tuple[int, ...]]) -> tuple[int, float]:
    """Bytes of the weights, and the perplexity of the windows' tokens from the second on."""
    config = parse_config(
        {"model_path": str(folder), "dtype": "bfloat16", "device": "cpu", "quantization": quantization}
    )
    topology = open_topology(1, "cpu")
    num_bytes = load_model(config, folder, topology)[0].num_bytes
    engine = make_engine(make_runner(config, folder, topology), config)
    scoring = SamplingParams(num_logprobs=0)
    requests = [
        Request(str(number), window, 1, sampling=scoring, scores_prompt=True) for number, window in enumerate(windows)
    ]
    engine.generate(requests)
    topology.close()
    logprobs = [scored.logprob for request in requests for scored in request.prompt_logprobs]
    assert len(logprobs) == sum(len(window) - 1 for window in windows)
    return num_bytes, math.exp(-sum(logprobs) / len(logprobs))


if __name__ == "__main__":
    try:
        main()
    except TSParallelError as error:
        sys.exit(f"quantization_quality: {error}")
