"""What each rank of `ts-parallel verify` runs. Rank 0 compares with the plain model and writes the report."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ts_parallel.checkpoint.gguf.prepared import is_gguf_folder
from ts_parallel.checkpoint.quantized import find_scheme
from ts_parallel.config import HandlerConfig, parse_config
from ts_parallel.engine.request import Request
from ts_parallel.errors import StartupError
from ts_parallel.runtime.runner import Runner
from ts_parallel.serving.causal_lm import make_engine, make_runner
from ts_parallel.step_plan import Chunk, StepPlan
from ts_parallel.topology import open_topology

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

GGUF = "gguf"
# Method of quantisation → transformers' class that makes weights of its codes.
_DEQUANTISING = {
    "compressed-tensors": "CompressedTensorsConfig",
    "fp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
}
NUM_PROMPTS = 8
_LONGEST_PROMPT = 96
_PATIENCE = timedelta(hours=6)  # rank 0 runs the plain model meanwhile


def main(settings: Path, report: Path) -> None:
    """
    Args:
        settings: a JSON file: the `handler` section, the plain model's folder `reference`, `max_tokens` per prompt.
    """
    values = json.loads(settings.read_text())
    config = parse_config(values["handler"])
    folder, reference = Path(config.model_path), Path(values["reference"])
    topology = open_topology(
        config.tensor_parallel_size,
        config.device,
        num_threads=config.num_threads,
        pipeline_parallel_size=config.pipeline_parallel_size,
        patience=_PATIENCE,
    )
    runner, error = None, None
    try:
        runner = make_runner(config, folder, topology)
    except StartupError as refused:
        error = str(refused)
    errors = topology.gather_errors(error)
    if runner is not None and not errors:
        if topology.rank == 0:
            report.write_text(json.dumps({"rows": compare(runner, config, reference, values["max_tokens"])}))
            runner.stop_followers()
        else:
            runner.follow()
    elif topology.rank == 0:
        report.write_text(json.dumps({"error": errors[0]}))
    topology.close()


def compare(runner: Runner, config: HandlerConfig, reference: Path, max_tokens: int) -> list[dict[str, Any]]:
    """Greedy tokens of all prompts at once, and the logits after each prompt, beside the plain model's."""
    # Not above: the ranks that follow need no transformers.
    from ts_parallel.partition.model.model_config import read_model_config

    prompts = make_prompts(read_model_config(reference), max_tokens)
    requests = [Request(str(index), tuple(prompt), max_tokens) for index, prompt in enumerate(prompts)]
    outputs = make_engine(runner, config).generate(requests)
    plain = read_plain(reference, config.dtype)
    rows = []
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = generate_plainly(plain, prompt, max_tokens)
        blocks = tuple(range(-(-len(prompt) // runner.block_size)))
        ours = runner.logits(StepPlan((Chunk("logits", tuple(prompt), 0, blocks, is_sampled=True),))).float().cpu()
        with torch.no_grad():
            theirs = plain(torch.tensor([prompt])).logits[:, -1].float()
        rows.append(
            {
                "num_prompt": len(prompt),
                "num_tokens": len(expected),
                "num_equal": sum(a == b for a, b in zip(expected, output, strict=True)),
                "difference": float((ours - theirs).abs().max()),
                "scale": float(theirs.abs().max()),
            }
        )
    return rows


def method_of(folder: Path) -> str:
    """What a checkpoint's weights are quantised by, as its section says it; empty where they are not."""
    if is_gguf_folder(folder):
        return GGUF
    found = find_scheme(folder)
    return "" if found is None else str(found[1].value.get("quant_method"))


def read_plain(folder: Path, dtype: str) -> PreTrainedModel:
    """transformers' own model; of a quantised checkpoint, with the weights that it computes of the codes itself."""
    import transformers

    options: dict[str, Any] = {}
    method = method_of(folder)
    if method in _DEQUANTISING:
        options["quantization_config"] = getattr(transformers, _DEQUANTISING[method])(dequantize=True)
    if method == GGUF:
        options["gguf_file"] = next(folder.glob("*.gguf")).name
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder, trust_remote_code=False, dtype=dtype, **options)
    if method == "bitsandbytes":
        model = model.dequantize()
    plain: PreTrainedModel = model.to(getattr(torch, dtype)).eval()
    return plain


def make_prompts(config: PretrainedConfig, max_tokens: int) -> list[list[int]]:
    """Token ids of `NUM_PROMPTS` prompts, from one token to as long as there is room for; the same each time."""
    text_config = config.get_text_config()
    longest = min(_LONGEST_PROMPT, text_config.max_position_embeddings - max_tokens)
    generator = torch.Generator().manual_seed(0)
    lengths = [1 + (longest - 1) * index // (NUM_PROMPTS - 1) for index in range(NUM_PROMPTS)]
    return [torch.randint(text_config.vocab_size, (length,), generator=generator).tolist() for length in lengths]


def generate_plainly(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """transformers' own greedy answer, which does not end before `max_tokens`."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_tokens,
        min_new_tokens=max_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
