"""lm-eval's local-completions on tasks made here: log-likelihoods of choices, answers until a stop, rolling ones."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager
from telling import BASE, MODEL, deed, tell

FOLDER = sys.argv[2]
"""The model's tokenizer."""
CHOICES = {
    "task": "choices",
    "output_type": "multiple_choice",
    "doc_to_text": "{{start}}",
    "doc_to_choice": "{{ends}}",
    "doc_to_target": "{{right}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}
ANSWERS = {
    "task": "answers",
    "output_type": "generate_until",
    "doc_to_text": "{{start}}",
    "doc_to_target": "{{whole}}",
    "generation_kwargs": {"until": [" table"], "max_gen_toks": 16, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}
ROLLING = {
    "task": "rolling",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{start}}{{whole}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}
DOCS = [
    {"start": "Hello from", "ends": [" the", " a", " no"], "right": 1, "whole": " a"},
    {"start": "It is", "ends": [" sunny", " rainy"], "right": 0, "whole": " sunny in Paris!"},
]


def results(task: dict[str, Any], **options: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        docs, file = Path(folder, "docs.jsonl"), Path(folder, "task.yaml")
        docs.write_text("".join(f"{json.dumps(own)}\n" for own in DOCS))
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(docs)}}, "test_split": "test"}
        file.write_text(json.dumps({**task, **data}))
        arguments = {"model": MODEL, "base_url": f"{BASE}/completions", "tokenizer": FOLDER, "max_length": 512}
        made: Any = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={**arguments, **options},
            tasks=[task["task"]],
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            bootstrap_iters=0,
            cache_requests=False,
        )
    found = made["results"][task["task"]]
    return {name.partition(",")[0]: round(value, 3) for name, value in found.items() if isinstance(value, float)}


@deed
def loglikelihood() -> Any:
    return [results(CHOICES), results(CHOICES, batch_size=2), results(CHOICES, tokenized_requests=False)]


@deed
def generate_until() -> Any:
    return [results(ANSWERS), results(ANSWERS, num_concurrent=2)]


@deed
def loglikelihood_rolling() -> Any:
    return results(ROLLING)["bits_per_byte"] > 1


tell("lm-eval")
