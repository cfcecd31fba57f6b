"""Which checkpoints answer as the plain ones that they stand for, at tensor and pipeline parallel size 2.

    python tests/checkpoint_table.py [--json FILE] [KIND…]

For each kind: a tiny checkpoint with random weights, quantised or stored in a way of its own, transformers' greedy
tokens of the weights that it stands for, and those of two ranks that read it as it is. Prints a Markdown table: equal,
refused with the line, or wrong. A kind is a row in `quantised_checkpoints.py`, `gguf_files.py`,
`stored_checkpoints.py`, or here, where codes are to be refused.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from exact_answers import Answers, judge, keep_programs, parallel_answers, plain_answers, write_prompts
from families import random_model, tiny
from gguf import GGMLQuantizationType
from gguf_files import GGUF_KINDS, GgufKind, write_gguf
from quantised_checkpoints import GROUP, KINDS, write
from safetensors.torch import load_file, save_file
from stored_checkpoints import STORED, STORED_REFUSED, Writer
from transformers.utils import logging

from ts_parallel.checkpoint.folders.located import checkpoint_folder
from ts_parallel.checkpoint.gguf.header import read_header
from ts_parallel.checkpoint.gguf.settings import config_of
from ts_parallel.errors import StartupError

SHAPES = {"tp 2": (2, 1), "pp 2": (1, 2)}
LENGTHS = (3, 11, 22)
MAX_TOKENS = 16
EQUAL, WRONG = "equal", "WRONG"


def _write_gguf(kind: GgufKind, folder: Path, plain: Path) -> None:
    write_gguf(folder, plain, kind)
    config, _ = config_of(read_header(folder / "model.gguf"))
    (folder / "config.json").write_text(json.dumps(config))


def _write_with_section(section: Mapping[str, Any], folder: Path, plain: Path, file: str = "config.json") -> None:
    """Plain weights, of which something says that they are not."""
    random_model(tiny("llama")()).save_pretrained(plain)
    shutil.copytree(plain, folder)
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps({**content, **section}))


def _write_without(kind: str, end: str, folder: Path, plain: Path) -> None:
    """A quantised checkpoint that lacks each tensor with a name that ends so."""
    write(folder, plain, KINDS[kind])
    file = folder / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if not name.endswith(end)}, file)


def _section(method: str, **settings: Any) -> Writer:
    return partial(_write_with_section, {"quantization_config": {"quant_method": method, **settings}})


_GROUPED = KINDS["int4, groups (compressed-tensors)"].section

WRITERS: dict[str, Writer] = {
    **{name: partial(write, kind=kind) for name, kind in KINDS.items()},
    **{name: partial(_write_gguf, kind) for name, kind in GGUF_KINDS.items()},
    **STORED,
}
REFUSED: dict[str, tuple[Writer, str]] = {
    "GGUF IQ4_NL": (partial(_write_gguf, GgufKind(GGMLQuantizationType.IQ4_NL)), "of ggml's type IQ4_NL"),
    "AWQ, gemv": (_section("awq", version="gemv", bits=4, group_size=GROUP), "has version 'gemv', which is not read"),
    "AutoRound": (_section("auto-round", bits=4), "quant_method 'auto-round', bits 4: this package does not read"),
    "BitNet": (_section("bitnet"), "quant_method 'bitnet': this package does not read"),
    "compressed-tensors, 2:4 sparse": (
        _section(**{**_GROUPED, "sparsity_config": {"format": "sparse-24-bitmask"}}, method="compressed-tensors"),
        "has 'sparsity_config', and what it does to the weights is not known",
    ),
    "compressed-tensors, rotated": (
        _section(**{**_GROUPED, "transform_config": {"config_groups": {}}}, method="compressed-tensors"),
        "has 'transform_config', and what it does to the weights is not known",
    ),
    "compressed-tensors, NVFP4": (
        _section(**{**_GROUPED, "format": "nvfp4-pack-quantized"}, method="compressed-tensors"),
        "has format 'nvfp4-pack-quantized', which is not read",
    ),
    "FP8 by its section alone": (_section("fp8"), "none of the tensors beside it is"),
    "FP8 without scales": (partial(_write_without, "FP8, blocks", "_scale_inv"), "made of codes, but no"),
    "GPTQ, 3 bits": (_section("gptq", bits=3), "has bits 3; integers of"),
    "GPTQ without zero points": (partial(_write_without, "AWQ", ".qzeros"), "made of codes, but no"),
    "HQQ": (_section("hqq"), "quant_method 'hqq': this package does not read"),
    "MLX": (
        partial(_write_with_section, {"quantization": {"group_size": 64, "bits": 4}}),
        "bits 4, group_size 64: this package does not read",
    ),
    "NVFP4 (ModelOpt)": (
        partial(_write_with_section, {"quantization": {"quant_algo": "NVFP4"}}, file="hf_quant_config.json"),
        "quant_algo 'NVFP4': this package does not read",
    ),
    "torchao": (_section("torchao"), "quant_method 'torchao': this package does not read"),
}
"""With what the line says."""

Outcomes = Mapping[str, Mapping[str, str]]
"""Kind → name of a shape → `EQUAL`, `WRONG`, or the line that refuses it."""


@dataclass(frozen=True)
class _Prepared:
    folder: Path
    plain: Answers
    refused: Mapping[str, str]
    root: Path


def _prepare(kind: str, root: Path) -> _Prepared:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder, plain = root / "quantised", root / "plain"
    root.mkdir()
    writer = WRITERS.get(kind) or {**REFUSED, **STORED_REFUSED}[kind][0]
    writer(folder, plain)
    config = json.loads((plain / "config.json").read_text())
    vocabulary = config.get("text_config", config)["vocab_size"]
    adapter = root / "adapter"
    settings = {"adapter_path": str(adapter)} if adapter.is_dir() else {}
    write_prompts(plain, vocabulary, LENGTHS, MAX_TOKENS)
    home, refused = folder, dict[str, str]()
    try:
        home = checkpoint_folder(folder)
        write_prompts(home, vocabulary, LENGTHS, MAX_TOKENS, **settings)
        for shape, sizes in SHAPES.items():
            refused |= _refusal(shape, home, sizes)
    except StartupError as error:
        refused = dict.fromkeys(SHAPES, str(error))
    own = folder.rename(root.with_name(f"{root.name}-own"))  # reports are by the folder's name
    for shape in refused:
        refused[shape] = refused[shape].replace(str(folder), "MODEL")
    if (programs := root / "quantised-programs").is_dir():
        programs.rename(own.with_name(f"{own.name}-programs"))
    answers = plain_answers(plain) if len(refused) < len(SHAPES) else []
    return _Prepared(own / home.relative_to(folder), answers, refused, root)


def _refusal(shape: str, folder: Path, sizes: tuple[int, int]) -> dict[str, str]:
    try:
        keep_programs(folder, *sizes)
    except StartupError as error:
        return {shape: str(error)}
    return {}


def find_out(kinds: Sequence[str]) -> Outcomes:
    """What has come of each kind."""
    with TemporaryDirectory() as scratch:
        root = Path(scratch)
        roots = [root / str(number) for number in range(len(kinds))]
        gc.freeze()
        # Forked, so that what they need is imported once: nothing has been computed here yet, so there are no threads.
        with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("fork")) as pool:
            prepared = dict(zip(kinds, pool.map(_prepare, kinds, roots), strict=True))
        runnable = [own.folder for own in prepared.values() if own.plain]
        found = parallel_answers(runnable, list(SHAPES.values()), root / "report.json") if runnable else {}
    return {
        kind: {
            shape: own.refused.get(shape) or _judge(found[sizes][own.folder.name], own)
            for shape, sizes in SHAPES.items()
        }
        for kind, own in prepared.items()
    }


def _judge(answers: Answers | str, own: _Prepared) -> str:
    outcome = judge(answers, own.plain, EQUAL, WRONG)
    return outcome.replace(str(own.folder), "MODEL").replace(str(own.root), "ROOT")


def markdown(outcomes: Outcomes) -> str:
    lines = ["| kind | " + " | ".join(SHAPES) + " |", "|---" * (1 + len(SHAPES)) + "|"]
    for kind, own in outcomes.items():
        told = [own[shape] for shape in SHAPES]
        cells = [told[0], *("the same" if told[0] == cell != EQUAL else cell for cell in told[1:])]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", default=[*WRITERS, *REFUSED, *STORED_REFUSED])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write kind → shape → outcome there, print nothing")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    outcomes = find_out(arguments.kinds)
    if arguments.json:
        arguments.json.write_text(json.dumps(outcomes))
    else:
        print(markdown(outcomes))


if __name__ == "__main__":
    main()
