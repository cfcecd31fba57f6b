"""A deferred model → one flat graph of tensor operations, made by running it once without data.

torch.export (non-strict) records what the model's own code does, with fake weights and symbolic sizes: no memory is
allocated, and the sizes that a step brings stay open. Attention calls and traffic between ranks are recorded as marker
operations, which the runtime replaces by its own: a graph knows no KV memory and no process group.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.symbol import SymT, symbol_is_type
from transformers import PreTrainedModel

from ts_parallel.errors import PlanError
from ts_parallel.partition.graph.functional import undo_plain_writes
from ts_parallel.topology import TensorParallelGroup

# Sizes that the example inputs have where they are dynamic: all different, none of them 0 or 1, for the trace would
# take equal sizes for one size, and those two for constants.
_EXAMPLE_SIZES = (7, 3, 11, 5)
_TIMES_LEAST = 3  # so that what is made of the smallest size is neither 0 nor 1


@torch.library.custom_op("ts_parallel::attention", mutates_args=())
def attention_marker(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None, site: int
) -> torch.Tensor:
    """Attention call number `site` of a model: `[1, H, T, D]`, `[1, KV, T, D]`, `[1, KV, T, E]`, sinks `[H]` if it has
    any → `[1, T, H, E]`."""
    raise NotImplementedError("a marker of a traced graph was run")


@attention_marker.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None, site: int
) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


@torch.library.custom_op("ts_parallel::all_reduce", mutates_args=())
def all_reduce_marker(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks of a tensor-parallel group."""
    raise NotImplementedError("a marker of a traced graph was run")


@all_reduce_marker.register_fake
def _(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor)


@torch.library.custom_op("ts_parallel::all_gather", mutates_args=())
def all_gather_marker(tensor: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """The concatenation over the ranks of a tensor-parallel group along the last dim."""
    raise NotImplementedError("a marker of a traced graph was run")


@all_gather_marker.register_fake
def _(tensor: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    return tensor.new_empty(*tensor.shape[:-1], sum(sizes))


@torch.library.custom_op("ts_parallel::from_own_start", mutates_args=())
def from_own_start_marker(numbers: torch.Tensor, starts: list[int]) -> torch.Tensor:
    """`numbers` counted from the start of this rank's part: one trace is good for every rank."""
    raise NotImplementedError("a marker of a traced graph was run")


@from_own_start_marker.register_fake
def _(numbers: torch.Tensor, starts: list[int]) -> torch.Tensor:
    return torch.empty_like(numbers)


@torch.library.custom_op("ts_parallel::own_part", mutates_args=())
def own_part_marker(tensor: torch.Tensor, starts: list[int], lengths: list[int], rank: int) -> torch.Tensor:
    """This rank's part of a tensor along the last dim; the trace was made as `rank`."""
    raise NotImplementedError("a marker of a traced graph was run")


@own_part_marker.register_fake
def _(tensor: torch.Tensor, starts: list[int], lengths: list[int], rank: int) -> torch.Tensor:
    return tensor.new_empty(*tensor.shape[:-1], lengths[rank])


class TracedGroup(TensorParallelGroup):
    """A tensor-parallel group whose traffic is recorded, not done, as is what depends on the rank's number."""

    def from_own_start(self, numbers: torch.Tensor, starts: tuple[int, ...]) -> torch.Tensor:
        counted: torch.Tensor = from_own_start_marker(numbers, list(starts))
        return counted

    def own_part(self, tensor: torch.Tensor, pieces: tuple[tuple[int, int], ...]) -> torch.Tensor:
        starts, lengths = zip(*pieces, strict=True)
        part: torch.Tensor = own_part_marker(tensor, list(starts), list(lengths), self.rank)
        return part

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return all_reduce_marker(tensor) if self.size > 1 else tensor

    def all_gather(self, tensor: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
        return all_gather_marker(tensor, list(sizes)) if self.size > 1 else tensor


@dataclass(frozen=True)
class TracedModel:
    """One flat graph of a whole model. Node names are those of `graph`."""

    graph: Graph
    tensors: Mapping[Node, str]
    """Placeholder → name of the parameter or buffer that it stands for."""
    parameters: frozenset[str]
    """Those of the names that are parameters."""
    constants: Mapping[Node, torch.Tensor]
    """Placeholder → a tensor that the model's code makes itself."""
    inputs: Mapping[Node, str]
    """Placeholder → name of the model input."""
    outputs: tuple[Node, ...]
    modules: Mapping[Node, str] = field(repr=False)
    """Node → name of the innermost module whose code it comes from."""


@dataclass(frozen=True)
class InputSpec:
    """A model input of a trace: `sizes` has a number where a dim is fixed, a letter where it is dynamic."""

    sizes: tuple[int | str, ...]
    dtype: torch.dtype


class _Call(nn.Module):
    """The model, called with named tensors, and the one tensor that is wanted of what it returns."""

    def __init__(self, model: PreTrainedModel, call: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]) -> None:
        super().__init__()
        self.model = model
        self._call = call

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self._call(inputs)


def trace(
    model: PreTrainedModel,
    inputs: Mapping[str, InputSpec],
    call: Callable[[Mapping[str, torch.Tensor]], torch.Tensor],
    limits: Mapping[str, int],
    least: Mapping[str, int] | None = None,
) -> TracedModel:
    """Record what `call`, which runs the deferred `model` on `inputs`, does.

    Args:
        limits: the largest value of each letter that the inputs' sizes have.
        least: the smallest one, where that is not 1.

    Raises:
        PlanError: the model's code depends on data or on the sizes; the message names the module and the line.
    """
    letters = dict.fromkeys(size for spec in inputs.values() for size in spec.sizes if isinstance(size, str))
    least = dict.fromkeys(letters, 1) | dict(least or {})
    sizes = zip(letters, _EXAMPLE_SIZES, strict=False)
    examples = {letter: size + _TIMES_LEAST * (least[letter] - 1) for letter, size in sizes}
    dims = {letter: Dim(letter, min=least[letter], max=limits[letter]) for letter in letters}
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    with fake_weights(model, mode), _watched(model) as entered:
        with mode:
            tensors = {
                name: torch.zeros([examples.get(size, size) for size in spec.sizes], dtype=spec.dtype)  # type: ignore[arg-type]
                for name, spec in inputs.items()
            }
        shapes = {
            name: {dim: dims[size] for dim, size in enumerate(spec.sizes) if isinstance(size, str)}
            for name, spec in inputs.items()
        }
        try:
            with mode, torch.no_grad():
                program = export(
                    _Call(model, call),
                    (tensors,),
                    dynamic_shapes=(shapes,),
                    strict=False,
                    prefer_deferred_runtime_asserts_over_guards=True,
                )
                if not undo_plain_writes(program.graph):
                    program = _functionalise(program)
        except PlanError:
            raise
        except Exception as error:
            raise PlanError(f"{type(model).__name__} cannot be traced: {_place(error, entered)}") from error
    return _read(program, list(inputs))


@contextmanager
def fake_weights(model: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Let the parameters and buffers of a deferred model pretend to lie on the CPU; tied ones stay tied."""
    before: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    fakes: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        owners: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for owner in owners:
            for name, tensor in owner.items():
                if tensor is None:
                    continue
                if tensor not in fakes:
                    with mode:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    fakes[tensor] = nn.Parameter(fake, requires_grad=False) if owner is module._parameters else fake
                before.append((owner, name, tensor))
    for owner, name, tensor in before:
        owner[name] = fakes[tensor]
    try:
        yield
    finally:
        for owner, name, tensor in before:
            owner[name] = tensor


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules whose forward is under way, outermost first; after an error, where it happened."""
    names = {module: name or type(model).__name__ for name, module in model.named_modules()}
    entered: list[str] = []

    def enter(module: nn.Module, _: object) -> None:
        entered.append(f"{names[module]} ({type(module).__name__})")

    def leave(module: nn.Module, _: object, __: object) -> None:
        entered.pop()

    hooks = [module.register_forward_pre_hook(enter) for module in names]
    hooks += [module.register_forward_hook(leave) for module in names]
    try:
        yield entered
    finally:
        for hook in hooks:
            hook.remove()


def _place(error: Exception, entered: list[str]) -> str:
    """`module: line of code: what was wrong`."""
    lines = str(error).strip().splitlines() or [""]
    at = f"{entered[-1] if entered else 'its own code'} stops it{line_of(error)}"
    return f"{at}: {type(error).__name__}: {lines[0]}"


def line_of(error: Exception) -> str:
    """ " at `line of code` (file:line)", the last of the model's own code; nothing where none was run."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/transformers/" in frame.filename]
    if not frames:
        return ""
    return f" at `{frames[-1].line}` ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})"


def _functionalise(program: ExportedProgram) -> ExportedProgram:
    """The same without operations that work in place, which a cut would lose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 warns of its own code
        functional: ExportedProgram = program.run_decompositions({})
    return functional


def _read(program: ExportedProgram, names: list[str]) -> TracedModel:
    """What the graph's placeholders and outputs stand for."""
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    tensors: dict[Node, str] = {}
    constants: dict[Node, torch.Tensor] = {}
    inputs: dict[Node, str] = {}
    parameters = set()
    for spec in program.graph_signature.input_specs:
        node = placeholders[spec.arg.name]
        if spec.kind == InputKind.USER_INPUT:
            inputs[node] = names[len(inputs)]
            continue
        assert spec.target is not None
        if spec.kind == InputKind.CONSTANT_TENSOR:
            value = program.constants[spec.target]
            if not isinstance(value, FakeTensor):
                constants[node] = value
            continue
        tensors[node] = spec.target.removeprefix("model.")
        if spec.kind == InputKind.PARAMETER:
            parameters.add(tensors[node])
    wanted = [spec.arg.name for spec in program.graph_signature.output_specs if spec.kind == OutputKind.USER_OUTPUT]
    outputs = tuple(node for node in program.graph.output_node().args[0] if node.name in wanted)
    modules = {node: _module_of(node) for node in program.graph.nodes if node.op == "call_function"}
    return TracedModel(program.graph, tensors, frozenset(parameters), constants, inputs, outputs, modules)


def _module_of(node: Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0].removeprefix("model").removeprefix(".") if stack else ""


def symbols_of(size: int | torch.SymInt) -> set[str]:
    """The names of the dynamic sizes that a size depends on."""
    if isinstance(size, int):
        return set()
    return {
        str(symbol) for symbol in size.node.expr.free_symbols if symbol_is_type(symbol, (SymT.SIZE, SymT.UNBACKED_INT))
    }
