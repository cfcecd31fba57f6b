"""A language model whose answers are written down: a Llama in which each token has one that follows it, told by no
other. It greets, answers in JSON where JSON is spoken of, calls a tool that it is offered, and tells what that said.

Whatever else it is made to say, by a form, it says in the fewest tokens. So clients see real tokens, calls, forms and
log-probabilities, and a test knows what all of them are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from chat_tokenizers import EOS, chat_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

CALL, CALL_END = "<tool_call>", "</tool_call>"
SAYS: Mapping[str, Sequence[str]] = {
    "<|greet|>": ("Hello", " from", " a", " table", "."),
    "<|json|>": ('{"city": "P', 'aris", "deg', 'rees": 2', "1}"),
    "<|call|>": (CALL, '\n{"name": "get_', 'weather", "argu', 'ments": {"ci', 'ty": "Paris', '"}}\n', CALL_END),
    "<|tell|>": ("It", " is", " sunny", " in", " Paris", "!"),
}
"""What follows each of the marks that the chat template ends with."""
GREETING, TOLD = "".join(SAYS["<|greet|>"]), "".join(SAYS["<|tell|>"])
_TEMPLATE = (
    "{% for tool in tools or [] %}tool {{ tool | tojson }}\n{% endfor %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "|{% endfor %}"
    "{% set text = messages | map(attribute='content') | map('string') | join(' ') | lower %}"
    "{% if add_generation_prompt %}"
    "{% if messages[-1].role == 'tool' %}<|tell|>{% elif tools %}<|call|>"
    "{% elif 'json' in text %}<|json|>{% else %}<|greet|>{% endif %}{% endif %}"
)
# What ends an answer soonest comes first.
_LIKED = (EOS, CALL_END, '"', "}", "]", "0", "1", "2", "e", "{", ":", ",", "[")
_WIDTH = 512


def table_model(folder: Path, max_model_len: int = 16384) -> Path:
    """A checkpoint of it."""
    pieces = [piece for said in SAYS.values() for piece in said]
    tokenizer = chat_tokenizer(special=list(SAYS), added=pieces, template=_TEMPLATE)
    eos: int = tokenizer.eos_token_id
    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=max_model_len,
        eos_token_id=eos,
        bos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
        dtype="float32",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    _write_table(model, tokenizer, size)
    model.generation_config.eos_token_id = eos
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def _write_table(model: Any, tokenizer: Any, size: int) -> None:
    """A token's embedding is a dim of its own, and one that all share: the head reads from the first which token
    follows, from the other which are liked. Attention and feed-forward compute, and add nothing."""
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    embedding.zero_()
    embedding[torch.arange(size), torch.arange(size)] = 1
    embedding[:, size] = 1
    eos = tokenizer.eos_token_id
    liked = tokenizer.convert_tokens_to_ids(list(_LIKED))
    order = [*liked, *(own for own in range(size) if own not in liked)]
    head.zero_()
    head[order, size] = -torch.arange(size, dtype=torch.float32)
    for mark, said in SAYS.items():
        ids = tokenizer.convert_tokens_to_ids([mark, *said, EOS])
        head[ids[1:], ids[:-1]] = 1000
    head[tokenizer.convert_tokens_to_ids(SAYS["<|greet|>"][0]), eos] = 1000  # of an answer that is not to end
