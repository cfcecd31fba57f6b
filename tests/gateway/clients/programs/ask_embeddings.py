"""LiteLLM on a model of embeddings and of nothing else: vectors of both providers' ways, and a ranking."""

from __future__ import annotations

from typing import Any

import litellm
from telling import BASE, MODEL, deed, tell

TEXTS = ["A cat sits on the mat.", "The weather is lovely today."]
PROVIDERS = ("openai", "hosted_vllm")


def made(provider: str, texts: Any, **fields: Any) -> Any:
    own = {"api_base": BASE, "api_key": "none", "timeout": 60}
    answer: Any = litellm.embedding(model=f"{provider}/{MODEL}", input=texts, **own, **fields)
    return answer


@deed
def embeddings() -> Any:
    return [[own["embedding"][:3] for own in made(provider, TEXTS).data] for provider in PROVIDERS]


@deed
def usage() -> Any:
    return [made(provider, TEXTS).usage.prompt_tokens > 8 for provider in PROVIDERS]


@deed
def dimensions() -> Any:
    return len(made("hosted_vllm", "one", dimensions=16).data[0]["embedding"])


@deed
def ranking() -> Any:
    own: Any = {"api_base": BASE, "api_key": "none"}
    answer: Any = litellm.rerank(
        model=f"hosted_vllm/{MODEL}", query="Where is the animal?", documents=TEXTS[::-1], top_n=2, **own
    )
    return [found["index"] for found in answer.results]


tell("litellm")
