"""guidellm, as people measure by it: synthetic prompts over chats and completions, several at once."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from telling import GATEWAY, MODEL, deed, tell

FOLDER = sys.argv[2]
"""The model's tokenizer."""
OPTIONS = {
    "profile": "kind=concurrent,streams=2",
    "constraint": "kind=max_requests,count=6",
    "tokenizer": f"kind=huggingface_auto,model={FOLDER}",
    "data": "kind=synthetic_text,prompt_tokens=64,output_tokens=24",
}


def measured(route: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        backend = f"kind=openai_http,target={GATEWAY},model={MODEL},request_format={route}"
        options = {**OPTIONS, "backend": backend, "output": f"kind=json,path={report}"}
        command = [str(Path(sys.executable).parent / "guidellm"), "run", "--disable-console"]
        command += [word for name, value in options.items() for word in (f"--{name}", value)]
        subprocess.run(command, check=True, capture_output=True, cwd=folder)
        (benchmark,) = json.loads(report.read_text())["benchmarks"]
    asked = benchmark["requests"]
    done = asked["successful"]
    assert all(own["time_to_first_token_ms"] > 0 and own["prompt_tokens"] >= 64 for own in done)
    return [len(done), len(asked["errored"]), sorted({own["output_tokens"] for own in done})]


@deed
def chats() -> Any:
    return measured("/v1/chat/completions")


@deed
def completions() -> Any:
    return measured("/v1/completions")


tell("guidellm")
