"""A text's output does not depend on what it is padded beside: of the families that may be padded, by their plain code;
of the others, because the handler pads none of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from batch_worker import MINILM, Worker, lone_rank
from transformers import CONFIG_MAPPING, AutoModel, AutoTokenizer, PretrainedConfig

from ts_parallel.serving.batch.texts.padding import BEARING, bears_padding

# What families call their sizes; each takes those that it knows.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "true_hidden_size", "intra_bottleneck_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_key_value_heads"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("head_dim", "d_head"), 8),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "d_inner", "ffn_dim", "d_ff"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64),
    **{"vocab_size": 97, "type_vocab_size": 2, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3},
    **{"cls_token_id": 4, "sep_token_id": 5, "mask_token_id": 6},
}
SPECIAL: dict[str, dict[str, Any]] = {
    "deberta-v2": {
        **{"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        "conv_kernel_size": 3,
    },
    "modernbert": {"local_attention": 8},
    "esm": {"position_embedding_type": "rotary"},
}
PADDED_BADLY = ("fnet", "mobilebert", "convbert", "nystromformer")


@pytest.fixture(scope="module", autouse=True)
def rank() -> Iterator[None]:
    with lone_rank():
        yield


def config_of(model_type: str, **settings: Any) -> PretrainedConfig:
    kind = CONFIG_MAPPING[model_type]
    known = kind().to_dict().keys() | dict(getattr(kind, "attribute_map", None) or {}).keys()
    wanted = {**SIZES, **SPECIAL.get(model_type, {}), **settings}
    return kind(**{name: value for name, value in wanted.items() if name in known})


def model_of(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModel.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def difference(model_type: str) -> float:
    """How much of a text's hidden states a longer neighbour changes, in their standard deviations."""
    model = model_of(config_of(model_type))
    ids = torch.randint(7, 97, (2, 15), generator=torch.Generator().manual_seed(0))
    ids[0, 9:] = 1
    mask = (ids != 1).long()
    with torch.no_grad():
        alone = model(input_ids=ids[:1, :9], attention_mask=mask[:1, :9]).last_hidden_state
        beside = model(input_ids=ids, attention_mask=mask).last_hidden_state[:1, :9]
    return float((alone - beside).abs().max() / alone.std())


@pytest.mark.parametrize("model_type", sorted(BEARING))
def test_family_that_may_be_padded_gives_the_same_beside_a_longer_text(model_type: str) -> None:
    assert difference(model_type) < 1e-4


@pytest.mark.parametrize("model_type", PADDED_BADLY)
def test_family_that_mixes_padding_in_is_not_padded(model_type: str) -> None:
    assert difference(model_type) > 1e-2
    assert not bears_padding(config_of(model_type))


@pytest.mark.parametrize("model_type", ["fnet", "mobilebert"])
def test_texts_of_such_a_family_are_those_of_the_plain_model_in_any_company(model_type: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    model = model_of(config_of(model_type, vocab_size=len(tokenizer)))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["a cat", "a dog sat on a mat", "rain", "one two", "sun", "so it is that we see it"]
    (answer,) = Worker("text_embedding", tmp_path).ask({"input": texts})
    assert answer[0] == 200, answer
    for text, own in zip(texts, answer[1]["data"], strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            expected = model(input_ids=ids).last_hidden_state[0].mean(dim=0)
        torch.testing.assert_close(torch.tensor(own["embedding"]), expected, rtol=1e-4, atol=1e-4)
