"""Which families answer exactly as transformers does at tensor_parallel_size 2 and pipeline_parallel_size 2.

    python tests/family_table.py [--json FILE] [FAMILY…]

For each family: a tiny model with random weights, transformers' own greedy tokens for four prompts, and those of two
ranks. Prints a Markdown table; families that have come to the same share a row. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from exact_answers import Answers, judge, keep_programs, parallel_answers, plain_answers, write_prompts
from families import TINY_FAMILIES, save_random_model
from transformers.utils import logging

from ts_parallel.errors import StartupError

SHAPES = {"tp 2": (2, 1), "pp 2": (1, 2)}
LENGTHS = (3, 11, 22, 40)
MAX_TOKENS = 24
EQUAL = "equal"

_OF_ONE_FAMILY = re.compile(r"^(model type '.*?'|\w+(ForCausalLM|LMHeadModel)) | at `.*` \([\w.]+:\d+\)")

Outcomes = Mapping[str, Mapping[str, str]]
"""Family → name of a shape → `EQUAL`, or why not."""


@dataclass(frozen=True)
class _Prepared:
    folder: Path
    plain: Answers
    """Empty where no shape is left to run."""
    refused: Mapping[str, str]
    """Name of a shape → the line that refuses it."""


def _prepare(family: str, folder: Path) -> _Prepared:
    """Checkpoint, prompts and programs, in a process that runs one model at a time."""
    torch.set_num_threads(1)
    config = TINY_FAMILIES[family]()
    save_random_model(folder, config)
    write_prompts(folder, config.vocab_size, LENGTHS, MAX_TOKENS)
    refused = {}
    for shape, sizes in SHAPES.items():
        try:
            keep_programs(folder, *sizes)
        except StartupError as error:
            refused[shape] = str(error)
    return _Prepared(folder, plain_answers(folder) if len(refused) < len(SHAPES) else [], refused)


def find_out(families: Sequence[str]) -> Outcomes:
    """What has come of each family."""
    with TemporaryDirectory() as root:
        folders = [Path(root) / str(number) for number in range(len(families))]
        gc.freeze()
        # Forked, so that what they need is imported once: nothing has been computed here yet, so there are no threads.
        with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("fork")) as pool:
            prepared = dict(zip(families, pool.map(_prepare, families, folders), strict=True))
        runnable = [own.folder for own in prepared.values() if own.plain]
        found = parallel_answers(runnable, list(SHAPES.values()), Path(root) / "report.json")
    return {
        family: {
            shape: own.refused.get(shape) or judge(found[sizes][own.folder.name], own.plain, EQUAL, "other tokens")
            for shape, sizes in SHAPES.items()
        }
        for family, own in prepared.items()
    }


def markdown(outcomes: Outcomes) -> str:
    """The table. Of a reason, the model's name and its line of code are left out: families share it."""
    rows: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for family, own in outcomes.items():
        rows[tuple(_OF_ONE_FAMILY.sub("", own[shape]) for shape in SHAPES)].append(family)
    lines = ["| | families | " + " | ".join(SHAPES) + " |", "|---" * (2 + len(SHAPES)) + "|"]
    for told, families in sorted(rows.items(), key=lambda row: -len(row[1])):
        cells = [told[0], *("the same" if told[0] == cell != EQUAL else cell for cell in told[1:])]
        lines.append(f"| {len(families)} | {', '.join(sorted(families))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", default=list(TINY_FAMILIES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write family → shape → outcome there, print nothing")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    outcomes = find_out(arguments.families)
    if arguments.json:
        arguments.json.write_text(json.dumps(outcomes))
    else:
        print(markdown(outcomes))


if __name__ == "__main__":
    main()
