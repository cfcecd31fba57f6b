"""Which models give a text the same output whatever it is padded with. All others get texts of one length together.

Masks keep padding out of attention, not out of a Fourier transform over all places (FNet), a convolution (ConvBERT,
Nyströmformer, CANINE) or a look at the next token (MobileBERT). Each family below has been tried beside such padding
(`tests/serving/batch/texts/test_padding.py`); one that is not here is taken for one of the others.
"""

from __future__ import annotations

from transformers import PretrainedConfig

# By the `model_type` of config.json.
BEARING = frozenset(
    """
    albert apertus arcee bert bert-generation biogpt bitnet bloom camembert cohere cohere2 data2vec-text deberta
    deberta-v2 diffllama distilbert doge electra embedding_gemma2_text ernie ernie4_5 esm eurobert exaone4
    falcon flaubert gemma gemma2 gemma3_text glm glm4 gpt2 gpt_bigcode gpt_neox granite gte helium ibert
    jina_embeddings_v3 layoutlm llama markuplm megatron-bert ministral ministral3 mistral modernbert
    modernbert-decoder mpnet mpt nanochat nemotron nomic_bert olmo olmo2 olmo3 openai-gpt opt persimmon phi phi3
    qwen2 qwen3 rembert roberta roberta-prelayernorm roc_bert roformer seed_oss smollm3 splinter squeezebert
    stablelm starcoder2 vaultgemma xglm xlm xlm-roberta xlm-roberta-xl xlnet
    """.split()
)


def bears_padding(config: PretrainedConfig) -> bool:
    """Whether texts of unlike lengths may be filled up to the longest."""
    return config.model_type in BEARING
