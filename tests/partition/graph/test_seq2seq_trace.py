"""Encoder–decoder models that cannot be served are refused with what stops them; what can be computed is not read."""

from __future__ import annotations

import pytest
import torch
from seq2seq_models import SPEECH, TEXT
from transformers import CONFIG_MAPPING

from ts_parallel.errors import PlanError
from ts_parallel.partition.build import shard_seq2seq
from ts_parallel.partition.graph.trace import TracedGroup
from ts_parallel.partition.model.seq2seq import call_of_seq2seq, decoder_layers, encoder_layers, longest_answer

SIZES = {
    **{"d_model": 32, "vocab_size": 96, "encoder_layers": 2, "decoder_layers": 3, "max_position_embeddings": 40},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
}


def test_attention_that_does_not_go_through_the_interface_is_refused() -> None:
    config = CONFIG_MAPPING["prophetnet"](
        **{"hidden_size": 32, "num_encoder_layers": 2, "num_decoder_layers": 2, "vocab_size": 96},
        **{"num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4},
    )
    with pytest.raises(PlanError, match="sends 0 attention calls through transformers' interface, 6 were expected"):
        shard_seq2seq(config, call_of_seq2seq(TEXT, config, torch.float32), torch.float32, TracedGroup(0, 1))


def test_speech_of_another_family_than_whisper_is_refused() -> None:
    with pytest.raises(PlanError, match="serves models of type 'whisper', this one is 'moonshine'"):
        call_of_seq2seq(SPEECH, CONFIG_MAPPING["moonshine"](), torch.float32)


def test_positions_that_no_checkpoint_has_are_no_parameters_to_be_read() -> None:
    config = CONFIG_MAPPING["marian"](**SIZES, pad_token_id=0, eos_token_id=1, decoder_start_token_id=2)
    sharded = shard_seq2seq(config, call_of_seq2seq(TEXT, config, torch.float32), torch.float32, TracedGroup(0, 2))
    assert [name for name in sharded.plan.parameters if "embed_positions" in name] == []
    assert (encoder_layers(sharded.model)[1], decoder_layers(sharded.model)[1]) == (2, 3)
    assert longest_answer(config) == 40
