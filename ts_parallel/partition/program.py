"""What one rank computes and holds of a model, as plain data.

A program is made once from the model (`build.py`), can be kept in a file (`prepared.py`), and is all that a rank needs
beside the bytes of its checkpoint: whoever runs it imports no tracer, and of the model's library at most the operations
of its own (those of a mixture's experts).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ts_parallel.checkpoint.index import StoredTensor
from ts_parallel.checkpoint.stored import Slice
from ts_parallel.errors import PlanError


@dataclass(frozen=True)
class PipelinePlace:
    """Which stages a rank has: of `num_ranks × virtual_stages` in a row, each `num_ranks`-th from `rank` on."""

    rank: int = 0
    num_ranks: int = 1
    virtual_stages: int = 1
    split_points: tuple[int, ...] | None = None
    """First layer of each stage after the first, where the user has chosen them."""

    @property
    def num_stages(self) -> int:
        return self.num_ranks * self.virtual_stages


ONE_STAGE = PipelinePlace()


@dataclass(frozen=True)
class ProgramRequest:
    """Whose program is wanted: rank `rank` of `size` tensor-parallel ones, at `place` among the pipeline ranks."""

    folder: Path
    dtype: str
    """`auto`, or the name of one."""
    rank: int
    size: int
    place: PipelinePlace = ONE_STAGE
    task: str | None = None
    """One of `model.encoder.TASKS` or `model.seq2seq.SEQ2SEQ_TASKS`; None for a causal language model."""
    settings: Path | None = None
    """Folder of the model's configuration, where it is neither `folder` nor the one above."""
    expert_parallel: bool = False
    """Whether each rank keeps some of a causal language model's experts whole, instead of a part of each."""


TOKEN_IDS, POSITIONS, ROWS = "token_ids", "positions", "rows"
"""The inputs of a causal language model: T packed tokens, their positions, the R rows whose logits are wanted."""

KEPT = "kept_"
"""How the names of model inputs begin that no leader sends: an earlier part has left them on the rank."""


@dataclass(frozen=True)
class AttentionSite:
    """One attention call: T tokens, H query heads, KV key/value heads, D and E the key and value head dims."""

    module_name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None
    scaling: float
    softcap: float | None
    has_sinks: bool
    """Whether it has sinks that are not handed over with its call."""

    @property
    def kv_elements_per_token(self) -> int:
        return self.num_kv_heads * (self.head_dim + self.value_dim)

    def kv_heads_of(self, rank: int, size: int) -> range:
        """The key/value heads that one of `size` ranks keeps, the first ranks one more where they do not divide. Where
        there are fewer of them than ranks, neighbouring ranks keep the same one."""
        if size > self.num_kv_heads:
            first = rank * self.num_kv_heads // size
            return range(first, first + 1)
        return part_of(self.num_kv_heads, rank, size)

    def heads_of(self, rank: int, size: int) -> range:
        """The query heads that one of `size` ranks keeps: those that read its key/value heads. Ranks that keep the same
        one share what reads it, the first of them one more where it does not divide."""
        kept, group = self.kv_heads_of(rank, size), self.num_heads // self.num_kv_heads
        first, end = kept.start * group, kept.stop * group
        if size <= self.num_kv_heads:
            return range(first, end)
        sharing = [other for other in range(size) if self.kv_heads_of(other, size) == kept]
        own = part_of(group, sharing.index(rank), len(sharing))
        return range(first + own.start, first + own.stop)

    def of_rank(self, rank: int, size: int) -> AttentionSite:
        """The same call with the heads that one of `size` ranks keeps."""
        heads, kv_heads = self.heads_of(rank, size), self.kv_heads_of(rank, size)
        return replace(self, num_heads=len(heads), num_kv_heads=len(kv_heads))


def part_of(count: int, rank: int, size: int) -> range:
    """Of `count` things in a row as many to each of `size` ranks, to the first ones one more where they do not
    divide."""
    return range(*(place * (count // size) + min(place, count % size) for place in (rank, rank + 1)))


@dataclass(frozen=True)
class ParameterPlan:
    """One parameter: what rank r keeps is `slices[r]`, all of it on every rank where `slices` is None."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    aliases: tuple[str, ...] = ()
    """Other names of the same tied parameter."""
    slices: tuple[Slice, ...] | None = None

    def local_shape(self, rank: int) -> tuple[int, ...]:
        if self.slices is None:
            return self.shape
        kept = self.slices[rank]
        return (*self.shape[: kept.dim], kept.length, *self.shape[kept.dim + 1 :])

    def local_bytes(self, rank: int) -> int:
        return torch.Size(self.local_shape(rank)).numel() * self.dtype.itemsize

    def describe(self) -> str:
        if self.slices is None:
            return "replicated"
        lengths = [kept.length for kept in self.slices]
        pieces = len(self.slices[0].pieces)
        return f"dim {self.slices[0].dim} in {'+'.join(map(str, lengths))}" + (f", {pieces} pieces" * (pieces > 1))


@dataclass(frozen=True)
class TensorParallelPlan:
    size: int
    styles: Mapping[str, str]
    """Module name → style; modules not named run as they are."""
    parameters: Mapping[str, ParameterPlan]
    attention: Mapping[str, AttentionSite] = field(default_factory=dict)
    """Attention modules whose heads are split, as they were before."""

    def local_bytes(self, rank: int) -> int:
        return sum(parameter.local_bytes(rank) for parameter in self.parameters.values())

    def kv_elements_per_token(self, sites: Iterable[AttentionSite], rank: int) -> int:
        """How many numbers a token's keys and values are on a rank, over `sites`, which may be another rank's."""
        wholes = [(self.attention.get(site.module_name), site) for site in sites]
        own = [site if whole is None else whole.of_rank(rank, self.size) for whole, site in wholes]
        return sum(site.kv_elements_per_token for site in own)

    def only(self, names: Collection[str]) -> TensorParallelPlan:
        """The same plan for the parameters that have one of `names`."""
        own = {
            name: entry
            for name, entry in self.parameters.items()
            if any(alias in names for alias in (name, *entry.aliases))
        }
        return replace(self, parameters=own)


@dataclass(frozen=True)
class Source:
    """`stored`, or some of its rows, fills the box of a whole parameter that begins at `corner` and has its shape.

    The box has length 1 in the leading dims that the stored tensor lacks: it is one of a stack.
    """

    stored: StoredTensor
    corner: tuple[int, ...]
    rows: tuple[int, int] | None = None
    """`(start, length)` of those; None: all."""

    @property
    def taken(self) -> StoredTensor:
        return self.stored if self.rows is None else self.stored.rows(*self.rows)

    @property
    def box(self) -> tuple[tuple[int, int], ...]:
        """`(start, length)` along each dim of the parameter."""
        shape = self.taken.shape
        return tuple(zip(self.corner, (1,) * (len(self.corner) - len(shape)) + shape, strict=True))


Sources: TypeAlias = Mapping[str, tuple[Source, ...]]
"""Parameter → the stored tensors that together fill it."""


@dataclass(frozen=True)
class Crossing:
    """A tensor on its way from stage to stage. Its dynamic sizes are those of model inputs."""

    name: str
    dtype: torch.dtype
    dims: tuple[int | str, ...]
    """A number, or an expression over the inputs' shapes: `token_ids[1]`."""

    def shape(self, sizes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Its shape in a step whose model inputs have these shapes."""
        return tuple(dim if isinstance(dim, int) else int(eval(dim, {"math": math}, sizes)) for dim in self.dims)


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer."""

    name: str


@dataclass(frozen=True)
class LinearLayer:
    """`hidden [..., I]` → `[..., O]` by a weight `[O, I]` that linears and embeddings alone read in its stage."""

    weight: str
    bias: str | None


@dataclass(frozen=True)
class Embedding:
    """Token ids `[...]` → their rows `[..., I]` of a weight `[O, I]`."""

    weight: str


@dataclass(frozen=True)
class LinearLayers:
    """Several that read the same hidden states; a tensor of each."""

    layers: tuple[LinearLayer, ...]


@dataclass(frozen=True)
class GatedLinear:
    """`activation(gate(x)) * up(x)`; the activation is `silu`, `gelu_tanh` or `relu`."""

    gate: LinearLayer
    up: LinearLayer
    activation: str


@dataclass(frozen=True)
class RmsNorm:
    """Root mean square norm over the last dim in float32; what is rounded is scaled by the weight or, with `is_offset`,
    scaled by one more than the weight and then rounded."""

    weight: str
    epsilon: float
    is_offset: bool


@dataclass(frozen=True)
class GatedSublayer:
    """`last(gated(norm(x)))`, and what is added to it where there is something."""

    norm: RmsNorm
    gated: GatedLinear
    last: LinearLayer


@dataclass(frozen=True)
class AttentionSublayer:
    """`last(attention(...))` of the queries, keys and values that `linears` make of `norm(x)`, the first two turned by
    `rotary`; and what is added to it where there is something."""

    norm: RmsNorm
    linears: LinearLayers
    last: LinearLayer
    site: int
    """The attention call's number among the stage's."""
    head_dim: int
    value_dim: int


Sublayer: TypeAlias = AttentionSublayer | GatedSublayer


@dataclass(frozen=True)
class SublayerStack:
    """Sublayers that follow each other: each adds what it gives to what the one before gave, the first to its input."""

    sublayers: tuple[Sublayer, ...]
    are_parts: bool
    """Whether what is added has to be summed over the tensor-parallel ranks before."""


@dataclass(frozen=True)
class Operation:
    """A callable by its full dotted name. `module` must be imported for it to be there."""

    name: str
    module: str = "torch"

    def resolve(self) -> Any:
        """The callable itself.

        Raises:
            PlanError: the name leads nowhere in this process.
        """
        start = self.module if self.name.startswith(f"{self.module}.") else self.name.partition(".")[0]
        importlib.import_module(self.module)
        found: Any = importlib.import_module(start)
        for name in self.name.removeprefix(f"{start}.").split("."):
            found = getattr(found, name, None)
        if found is None:
            raise PlanError(f"{self.name!r}, which the model calls, is not found once {self.module!r} is imported")
        return found


@dataclass(frozen=True)
class Constant:
    """A value of the model's code; a tensor among them goes where the weights are."""

    value: Any


@dataclass(frozen=True)
class Supplied:
    """What the runtime supplies: `device`, `attention`, `rotary`, or a method of the tensor-parallel group."""

    name: str


StageGlobal: TypeAlias = (
    Weight
    | Embedding
    | LinearLayer
    | LinearLayers
    | GatedLinear
    | RmsNorm
    | GatedSublayer
    | AttentionSublayer
    | SublayerStack
    | Operation
    | Constant
    | Supplied
)
Linears: TypeAlias = LinearLayer | LinearLayers | GatedLinear


def linears_of(entry: StageGlobal) -> tuple[LinearLayer, ...]:
    """The linears that a call computes."""
    match entry:
        case LinearLayer():
            return (entry,)
        case LinearLayers(layers):
            return layers
        case GatedLinear(gate, up, _):
            return (gate, up)
        case GatedSublayer(_, gated, last):
            return (gated.gate, gated.up, last)
        case AttentionSublayer(_, linears, last):
            return (*linears.layers, last)
        case SublayerStack(sublayers):
            return tuple(layer for sublayer in sublayers for layer in linears_of(sublayer))
        case _:
            return ()


@dataclass(frozen=True)
class StageCode:
    """One stage as the source of a flat function `run(step, inputs, received)`, and what its global names stand for."""

    source: str
    globals: Mapping[str, StageGlobal]
    inputs: tuple[str, ...]
    """Names of the model inputs that it reads."""
    received: tuple[Crossing, ...]
    sent: tuple[Crossing, ...]
    """What goes to the next stage; on the last one, the model's outputs."""
    sites: tuple[AttentionSite, ...]
    """Its attention calls, in call order."""
    kept: tuple[str, ...] = ()
    """The names of what it returns behind what is sent, which stays on the rank."""


@dataclass(frozen=True)
class RankProgram:
    """One rank's part of a model, without its weights."""

    architecture: str
    dtype: torch.dtype
    plan: TensorParallelPlan
    """Of the parameters that this rank has."""
    whole_plan: TensorParallelPlan
    """Of the parameters that any rank has."""
    stages: tuple[StageCode, ...]
    """This rank's; none where the model's own modules run. Of a model in parts, each part's in turn."""
    inputs_by_stage: tuple[tuple[str, ...], ...]
    """The model inputs that each stage of the whole model reads, in the order of the stages."""
    outputs: tuple[Crossing, ...]
    """What the last stage of the whole model makes; of a model in parts, what the last stage of each makes."""
    sites_of_ranks: tuple[tuple[AttentionSite, ...], ...]
    """The attention calls of each pipeline rank, with the heads that this tensor-parallel rank has."""
    kv_elements_of_ranks: tuple[int, ...]
    """How many numbers the keys and values of one token are on each pipeline rank, on the tensor-parallel rank that has
    most: all ranks have as many blocks."""
    bytes_of_ranks: tuple[int, ...] = ()
    """Bytes of parameters of each pipeline rank, on the tensor-parallel rank that has most."""
    head: str | None = None
    """The parameter of `whole_plan` that logits are computed by."""
    max_positions: int | None = None
    """The longest sequence that the model was trained for, where its config names it."""
    changing_rope: tuple[str, int] | None = None
    """Kind of the rotary frequencies that depend on the longest sequence of a batch, and the length where they begin
    to; None for all other kinds."""
    sources: Sources = field(default_factory=dict, repr=False)
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    """What its stages read that is in no checkpoint: rotary frequencies, say."""
    untied: tuple[str, ...] = ()
    """Parameters that the model's configuration ties to others, and its checkpoint holds with values of their own."""
    stored_names: Mapping[str, str | None] = field(default_factory=dict, repr=False)
    """Parameter of any rank → the stored tensor that is all of it; None where the parameter has several names."""

    @property
    def head_sizes(self) -> tuple[int, ...]:
        """How many of the vocabulary's logits each rank of the last stage computes; one number where each computes all,
        none where the model has no head."""
        if self.head is None:
            return ()
        entry = self.whole_plan.parameters[self.head]
        return tuple(kept.length for kept in entry.slices) if entry.slices else (entry.shape[0],)

    def packable(self) -> frozenset[str]:
        """The parameters that linears read, and embeddings at most beside them: they may be laid out otherwise."""
        every = [entry for stage in self.stages for entry in stage.globals.values()]
        layers = [layer for entry in every for layer in linears_of(entry)]
        linears = {layer.weight for layer in layers}
        others = {entry.name for entry in every if isinstance(entry, Weight)}
        others |= {layer.bias for layer in layers if layer.bias is not None}
        named = {name: {name, *entry.aliases} for name, entry in self.plan.parameters.items()}
        return frozenset(name for name, own in named.items() if own & linears and not own & others)
