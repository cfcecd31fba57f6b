"""How a causal language model is called on the packed tokens of a step, and its trace.

T tokens of all chunks lie one after the other in one row; R of them are wanted: only their logits are computed.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node
from transformers import PreTrainedModel

from ts_parallel.errors import PlanError
from ts_parallel.partition.graph.trace import InputSpec, TracedModel, attention_marker, symbols_of, trace
from ts_parallel.partition.model.attention_sites import NoteTaker, attach, forward_arguments
from ts_parallel.partition.program import POSITIONS, ROWS, TOKEN_IDS, AttentionSite

# Far more tokens than a step has; a family that fixes a lower limit says so in the trace's error.
_MOST_TOKENS = 2**20
_INPUTS = {
    TOKEN_IDS: InputSpec((1, "T"), torch.int64),
    POSITIONS: InputSpec((1, "T"), torch.int64),
    ROWS: InputSpec(("R",), torch.int64),
}
# Operations, by their name in aten, on dims of which they let one entry see another.
_CONVOLUTIONS = {"convolution", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "scaled_dot_product_attention"}
_REDUCTIONS = {
    *("sum", "mean", "prod", "var", "std", "norm", "linalg_vector_norm", "logsumexp"),
    *("max", "min", "amax", "amin", "median", "softmax", "_softmax", "log_softmax", "_log_softmax"),
    *("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "sort", "argsort", "topk", "flip", "roll"),
}
_PRODUCTS = {"matmul", "bmm", "mm", "baddbmm", "addmm"}
_LOOK_UPS = {"index", "index_select", "index_put", "index_add", "gather", "scatter", "scatter_add"}
_SHIFTS = {"pad", "constant_pad_nd", "slice", "select"}


def call_causal_lm(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The logits `[1, R, V]` of the wanted rows; V is this rank's part of the vocabulary."""
    arguments = forward_arguments(inputs[TOKEN_IDS], inputs[POSITIONS])
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits: torch.Tensor = model(**arguments, logits_to_keep=inputs[ROWS]).logits
        return logits
    logits = model(**arguments).logits
    return logits[:, inputs[ROWS]]


class TracedAttention(NoteTaker):
    """The attention backend of a trace: each call is noted as a site and recorded as a marker."""

    def _answer(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        self.sites[-1] = replace(self.sites[-1], has_sinks=False)  # the program hands them over with each call
        output: torch.Tensor = attention_marker(query, key, value, sinks, len(self.sites) - 1)
        return output


def trace_causal_lm(model: PreTrainedModel, num_calls: int) -> tuple[TracedModel, tuple[AttentionSite, ...]]:
    """The graph of a deferred, sharded model, and its attention calls with the heads that this rank has.

    Args:
        num_calls: how many attention calls the model makes.

    Raises:
        PlanError: it cannot be traced, or it mixes tokens other than by attention.
    """
    attention = TracedAttention(model)
    attach(model, attention)
    limits = {"T": _MOST_TOKENS, "R": _MOST_TOKENS}
    traced = trace(model, _INPUTS, lambda inputs: call_causal_lm(model, inputs), limits)
    calls = [node for node in _live(traced) if node.target is attention_marker._opoverload]
    if len(calls) != num_calls:
        raise PlanError(
            f"{type(model).__name__} makes {num_calls} attention calls, of which {len(calls)} are in its trace"
        )
    _refuse_token_mixers(model, traced)
    return traced, tuple(attention.sites)


def _live(traced: TracedModel) -> set[Node]:
    """The nodes that the outputs depend on."""
    live: set[Node] = set()
    waiting = list(traced.outputs)
    while waiting:
        node = waiting.pop()
        if node not in live:
            live.add(node)
            waiting += node.all_input_nodes
    return live


def _refuse_token_mixers(model: PreTrainedModel, traced: TracedModel) -> None:
    """Packed tokens of several requests lie side by side: whatever lets one see another, but attention, is wrong."""
    token_ids = next(node for node, name in traced.inputs.items() if name == TOKEN_IDS)
    (tokens,) = symbols_of(token_ids.meta["val"].shape[1])
    live = _live(traced)
    for node in live:
        if node.op == "call_function" and _mixes(node, tokens):
            raise PlanError(
                f"{type(model).__name__} mixes tokens by {node.target} in {traced.modules[node]!r}; only attention "
                "that goes through transformers' interface can be paged"
            )
    for node in _users_of_places([node for node in traced.graph.nodes if node in live], tokens):
        raise PlanError(
            f"{type(model).__name__} computes with a token's place in its step by {node.target} in "
            f"{traced.modules[node]!r}; only positions that it takes from position_ids are those of a request"
        )


def _users_of_places(nodes: list[Node], tokens: str) -> Iterator[Node]:
    """The operations that make real numbers of where each token lies among the T of a step, other than those that sort
    tokens and put them back, as a mixture's experts do. `nodes` are in the order of the graph."""
    places: set[Node] = set()
    for node in nodes:
        value = node.meta.get("val")
        if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(value, torch.Tensor):
            continue
        name = node.target._schema.name.removeprefix("aten::")
        is_of_places = not places.isdisjoint(node.all_input_nodes)
        if name == "arange" and tokens in symbols_of(value.shape[0]):
            places.add(node)
        elif is_of_places and not value.is_floating_point():
            places.add(node)
        elif is_of_places and not (name in _LOOK_UPS and any(tokens in symbols_of(size) for size in _source(node))):
            yield node


def _source(node: Node) -> torch.Size:
    """The shape of what a look-up looks into."""
    shape: torch.Size = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    return shape


def _mixes(node: Node, tokens: str) -> bool:
    """Whether an operation on real numbers lets tokens see each other; `tokens` is the name of the size T."""
    arguments = [part for argument in node.args for part in (argument if isinstance(argument, list) else [argument])]
    values = [argument.meta.get("val") for argument in arguments if isinstance(argument, Node)]
    tensors = [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]
    if not tensors or not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target._schema.name.removeprefix("aten::")
    of_tokens = [[tokens in symbols_of(size) for size in tensor.shape] for tensor in tensors]
    if name in _CONVOLUTIONS:
        return any(map(any, of_tokens))
    if name in _PRODUCTS:
        return len(tensors) > 1 and of_tokens[-2][-1]
    options = _options_of(node)
    if name in _REDUCTIONS and "other" not in options:
        dims = options.get("dim", options.get("dims"))
        dims = [dims] if isinstance(dims, int) else dims or range(tensors[0].ndim)
        return any(of_tokens[0][dim] for dim in dims)
    if name == "layer_norm":
        return any(of_tokens[0][-len(options["normalized_shape"]) :])
    if name == "einsum":
        return _contracts(options["equation"], of_tokens)
    return name in _SHIFTS and _shifts(options, of_tokens[0])


def _options_of(node: Node) -> dict[str, Any]:
    """The arguments of a call by name, also those that it leaves at their default."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    return {**defaults, **dict(zip((argument.name for argument in arguments), node.args, strict=False)), **node.kwargs}


def _contracts(equation: str, of_tokens: list[list[bool]]) -> bool:
    """Whether an einsum sums over tokens."""
    operands, _, result = equation.replace(" ", "").partition("->")
    for operand, own in zip(operands.split(","), of_tokens, strict=True):
        letters = operand.replace("...", "." * (len(own) - len(operand) + 3))
        if any(is_t and letter not in result for letter, is_t in zip(letters, own, strict=True)):
            return True
    return False


def _shifts(options: Mapping[str, Any], of_tokens: list[bool]) -> bool:
    """Whether a pad, slice or select moves tokens, or leaves some out."""
    if "pad" in options:  # two numbers a dim, from the last dim on
        return any(amount != 0 and of_tokens[-1 - place // 2] for place, amount in enumerate(options["pad"]))
    if not of_tokens[options["dim"]]:
        return False
    is_whole = options.get("start") in (None, 0) and options.get("end") in (None, sys.maxsize)
    return "index" in options or not is_whole or options["step"] != 1
