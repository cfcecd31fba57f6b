"""Encoder–decoder models in three traced parts: how each is called, and which of its tensors stay where they are.

    encode    the encoder's inputs → its hidden states
    prefill   the hidden states and the first T tokens of the answer → the next token's logits
    decode    one token more, and what the earlier ones left → the next token's logits

B items of a micro-batch, S positions of the encoder, T tokens, P tokens before them. Prefill and decode leave the keys
and values of each decoder layer behind, for the rank that runs the layer: a decode step computes those of one token and
none of the encoder's. The model's own cache object is what they are read from and handed back in; the model's own code
runs, and none of it is copied here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    DynamicCache,
    EncoderDecoderCache,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput

from ts_parallel.checkpoint.stored import Slice
from ts_parallel.errors import PlanError
from ts_parallel.partition.graph.trace import InputSpec, TracedModel, trace
from ts_parallel.partition.model.encoder import CTC, MOST_ITEMS, longest_text
from ts_parallel.partition.program import KEPT, TensorParallelPlan

SPEECH = "automatic_speech_recognition"
SEQ2SEQ_TASKS = ("text2text_generation", SPEECH)
ENCODE, PREFILL, DECODE = range(3)
"""The numbers of the parts."""
NUM_PARTS = 3

TOKENS, PAST, HIDDEN, MASK = "decoder_input_ids", "past", "encoder_hidden_states", "attention_mask"
"""Inputs of the decoder's parts. `past` has as many elements as there are tokens before, and says nothing else."""

_TEXT = {"input_ids": InputSpec(("B", "S"), torch.int64), MASK: InputSpec(("B", "S"), torch.int64)}
_KINDS = ("self_key", "self_value", "cross_key", "cross_value")

Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Seq2SeqCall:
    """One encoder–decoder model."""

    auto_class: Any
    inputs: Mapping[str, InputSpec]
    """The encoder's."""
    limits: Mapping[str, int]
    """The largest value of each letter of the inputs' sizes."""


@dataclass(frozen=True)
class TracedPart:
    traced: TracedModel
    """Its one output is what the leader gets."""
    kept: Mapping[Node, str]
    """What stays on the rank that computes it → the name under which `decode` reads it."""
    layers: tuple[str, int]
    """The list of layers that it is cut between, and how many there are."""


def call_of_seq2seq(task: str, config: PretrainedConfig, dtype: torch.dtype) -> Seq2SeqCall:
    """How `task` runs the model of `config`.

    Raises:
        PlanError: the task is speech's, and the model not Whisper, whose inputs alone are known.
    """
    positions = longest_answer(config)
    limits = {"B": MOST_ITEMS, "S": longest_text(config), "T": positions, "P": positions - 1}
    if task != SPEECH:
        return Seq2SeqCall(AutoModelForSeq2SeqLM, _TEXT, limits)
    if config.model_type != "whisper":
        raise PlanError(
            f"task {SPEECH!r} serves models of type 'whisper', this one is {config.model_type!r}; those that hear as "
            f"wav2vec2 does are of task {CTC!r}"
        )
    # Its two convolutions halve the frames once.
    features = InputSpec(("B", config.num_mel_bins, 2 * config.max_source_positions), dtype)
    return Seq2SeqCall(AutoModelForSpeechSeq2Seq, {"input_features": features}, limits)


def longest_answer(config: PretrainedConfig) -> int:
    """The most tokens that the decoder has positions for, those before the answer included."""
    own = getattr(config, "max_target_positions", None) or getattr(config, "max_position_embeddings", None)
    return int(own or 2**20)


def compute_unsaved(model: PreTrainedModel) -> None:
    """Let parameters that no checkpoint has (sinusoidal positions) be buffers, whose values the model computes."""
    unsaved = set(model._keys_to_ignore_on_save or ())
    for name in [name for name, _ in model.named_parameters() if name in unsaved]:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        values = module.get_parameter(leaf)
        delattr(module, leaf)
        module.register_buffer(leaf, values.data, persistent=False)


def as_applied(model: PreTrainedModel, plan: TensorParallelPlan) -> TensorParallelPlan:
    """The plan as it is to be applied: encoder and decoder each have an embedding module of their own, tied to the
    planned one, and look up in it as that one does; the head gathers its logits, for the leader wants them all."""
    styles, parameters = dict(plan.styles), dict(plan.parameters)
    planned = {f"{name}.weight" for name, style in plan.styles.items() if style in ("embedding", "head")}
    head = model.get_output_embeddings()
    for entry in plan.parameters.values():
        names = (entry.name, *entry.aliases)
        if not planned & set(names):
            continue
        for name in names:
            owner = name.rpartition(".")[0]
            styles[owner] = "colwise_gather_output" if model.get_submodule(owner) is head else "embedding"
            parameters[name] = replace(entry, name=name, aliases=tuple(other for other in names if other != name))
    return replace(plan, styles=styles, parameters=parameters)


def decoder_layers(model: PreTrainedModel) -> tuple[str, int]:
    return _layers_of(model, model.get_decoder())


def encoder_layers(model: PreTrainedModel) -> tuple[str, int]:
    return _layers_of(model, model.get_encoder())


def _layers_of(model: PreTrainedModel, stack: nn.Module) -> tuple[str, int]:
    """Name and length of the list of layers of the encoder or the decoder."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and any(module is child for child in stack.children()):
            return name, len(module)
    raise PlanError(f"{type(stack).__name__} of {type(model).__name__} has no list of its layers")


def with_own_biases(model: PreTrainedModel, plan: TensorParallelPlan) -> TensorParallelPlan:
    """The plan with the columns of each table of position biases, which has one for each head, dealt out as the heads
    are. All layers read the first one's table."""
    parameters = dict(plan.parameters)
    for name, site in plan.attention.items():
        for leaf, table in model.get_submodule(name).named_children():
            own = f"{name}.{leaf}.weight"
            if isinstance(table, nn.Embedding) and table.weight.shape[1] == site.num_heads and own in parameters:
                heads = [site.heads_of(rank, plan.size) for rank in range(plan.size)]
                slices = tuple(Slice(1, ((kept.start, len(kept)),)) for kept in heads)
                parameters[own] = replace(parameters[own], slices=slices)
    return replace(plan, parameters=parameters)


def run_whole(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    """The encoder and one token of the decoder, for whoever wants to see every attention call."""
    hidden = _encode(model, {name: tensor for name, tensor in inputs.items() if name != TOKENS})
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    return _next_logits(model, hidden, cache, 0, inputs)


def with_tokens(inputs: Mapping[str, InputSpec]) -> dict[str, InputSpec]:
    """The inputs of `run_whole`."""
    return {**inputs, TOKENS: InputSpec(("B", "T"), torch.int64)}


def trace_parts(model: PreTrainedModel, call: Seq2SeqCall) -> tuple[TracedPart, ...]:
    """The three parts of a deferred, sharded model, in the order of their numbers.

    Raises:
        PlanError: the model's code depends on data or on the sizes; the message names the module and the line.
    """
    layers = decoder_layers(model)
    names = [f"{KEPT}{layer}_{kind}" for layer in range(layers[1]) for kind in _KINDS]
    encode = trace(model, call.inputs, lambda inputs: _encode(model, inputs), call.limits)
    hidden = _spec(encode.outputs[0], ("B", "S", ""))
    shared = {MASK: call.inputs[MASK]} if MASK in call.inputs else {}
    given = {TOKENS: InputSpec(("B", "T"), torch.int64), **shared, HIDDEN: hidden}
    prefill = trace(model, given, _answers(lambda inputs: _prefill(model, inputs)), call.limits)
    states = dict(zip(names, prefill.outputs[1:], strict=True))
    given = {TOKENS: InputSpec(("B", 1), torch.int64), PAST: InputSpec(("P",), torch.int64), **shared}
    given |= {name: _spec(node, ("B", "", "S" if "cross" in name else "P", "")) for name, node in states.items()}
    decode = trace(model, given, _answers(lambda inputs: _decode(model, names, inputs)), call.limits)
    _read_sizes_of_given(decode)
    grown = zip([name for name in names if "cross" not in name], decode.outputs[1:], strict=True)
    return (
        TracedPart(encode, {}, encoder_layers(model)),
        TracedPart(_first_output(prefill), {node: name for name, node in states.items()}, layers),
        TracedPart(_first_output(decode), {node: name for name, node in grown}, layers),
    )


def _answers(call: Callable[[Inputs], tuple[torch.Tensor, ...]]) -> Callable[[Inputs], torch.Tensor]:
    """A trace records each tensor of a tuple, though it asks for one alone."""
    return call  # type: ignore[return-value]


def _read_sizes_of_given(traced: TracedModel) -> None:
    """Let sizes be read off inputs that every stage can be given, not off what stays on one rank."""
    given = {
        size.node.expr: (node, dim)
        for node, name in traced.inputs.items()
        if not name.startswith(KEPT)
        for dim, size in enumerate(node.meta["val"].shape)
        if isinstance(size, torch.SymInt)
    }
    for node in traced.graph.nodes:
        if node.target is torch.ops.aten.sym_size.int and traced.inputs.get(node.args[0], "").startswith(KEPT):
            node.args = given[node.meta["val"].node.expr]


def _first_output(traced: TracedModel) -> TracedModel:
    return replace(traced, outputs=traced.outputs[:1])


def _spec(node: Node, letters: tuple[str, ...]) -> InputSpec:
    """The tensor that a node makes as an input; `letters` name its dims where they are dynamic."""
    value = node.meta["val"]
    sizes = (size if isinstance(size, int) else letter for size, letter in zip(value.shape, letters, strict=True))
    return InputSpec(tuple(sizes), value.dtype)


def _encode(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    hidden: torch.Tensor = model.get_encoder()(**inputs).last_hidden_state
    return hidden


def _prefill(model: PreTrainedModel, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Logits `[B, V]`, then four tensors a layer, as `_KINDS` names them."""
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    logits = _next_logits(model, inputs[HIDDEN], cache, 0, inputs)
    pairs = zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True)
    return logits, *(tensor for own, cross in pairs for tensor in (own.keys, own.values, cross.keys, cross.values))


def _decode(model: PreTrainedModel, names: list[str], inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Logits `[B, V]`, then each layer's keys and values of its own tokens."""
    own, cross = DynamicCache(), DynamicCache()
    for cache, kind in ((own, "self"), (cross, "cross")):
        states = iter([inputs[name] for name in names if kind in name])
        for key, value in zip(states, states, strict=True):
            cache.layers.append(_filled_layer(cache, key, value))
    both = EncoderDecoderCache(own, cross)
    # The encoder's keys are there already, so of its hidden states no more than their number is looked at.
    hidden = inputs[names[2]].new_zeros(inputs[TOKENS].shape[0], inputs[names[2]].shape[2], 1)
    logits = _next_logits(model, hidden, both, inputs[PAST].shape[0], inputs)
    return logits, *(tensor for layer in own.layers for tensor in (layer.keys, layer.values))


def _filled_layer(cache: DynamicCache, key: torch.Tensor, value: torch.Tensor) -> Any:
    layer = cache.layer_class_to_replicate()
    layer.lazy_initialization(key, value)
    layer.keys, layer.values = key, value
    return layer


def _next_logits(
    model: PreTrainedModel, hidden: torch.Tensor, cache: EncoderDecoderCache, num_before: int, inputs: Inputs
) -> torch.Tensor:
    """`[B, V]` after the last token. The head computes no other row."""
    tokens = inputs[TOKENS]
    # A mask of ones carries no information, but given one, transformers does not search the positions for borders.
    ones = tokens.new_ones(tokens.shape[0], num_before + tokens.shape[1])
    known = {MASK: inputs[MASK]} if MASK in inputs else {}
    with _last_row_alone(model.get_output_embeddings()):
        output = model(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
            decoder_input_ids=tokens,
            decoder_attention_mask=ones,
            past_key_values=cache,
            use_cache=True,
            **known,
        )
    logits: torch.Tensor = output.logits[:, -1]
    return logits


@contextmanager
def _last_row_alone(head: nn.Module) -> Iterator[None]:
    """`[B, T, hidden]` → `[B, 1, hidden]` before the head."""
    hook = head.register_forward_pre_hook(lambda _, arguments: (arguments[0][:, -1:],))
    try:
        yield
    finally:
        hook.remove()
