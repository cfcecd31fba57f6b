"""The contract of a backend: all that a rank's stage and runner want computed, and who owns what meanwhile.

Knows tensors, step plans and the entries of a program; no model, no request and no process group's inside. A backend is
made once for a rank (`choose`); `torch` works anywhere, and the others are made of it: they override what they do
better. T tokens of a step, R rows whose logits are wanted; H, KV, D and E as in `AttentionSite`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeAlias

import torch

from ts_parallel.partition.load import WeightLayout
from ts_parallel.partition.program import (
    AttentionSite,
    AttentionSublayer,
    Crossing,
    GatedSublayer,
    Linears,
    RankProgram,
    RmsNorm,
    SublayerStack,
)
from ts_parallel.step_plan import Chunk, StepPlan
from ts_parallel.topology import TensorParallelGroup

Tensors: TypeAlias = Mapping[str, Any]
"""A rank's parameters and buffers by name; a linear's weight may lie as the backend's `weights` has it."""

Sublayer: TypeAlias = Callable[..., torch.Tensor]


class StepLayout(Protocol):
    """A step plan as tensors, and whatever else the backend's attention wants to know of it."""

    @property
    def token_ids(self) -> torch.Tensor: ...  # [1, T]

    @property
    def positions(self) -> torch.Tensor: ...  # [1, T]

    @property
    def sampled_rows(self) -> torch.Tensor: ...  # [R], the tokens whose logits are wanted


class Attention(Protocol):
    """The attention calls of one rank's stages. Owns their KV memory, and how keys and values lie in it."""

    def lay_out(self, plan: StepPlan) -> StepLayout:
        """What every attention call of a step shares."""
        ...

    def __call__(
        self,
        step: Any,
        query: torch.Tensor,  # [1, H, T, D]
        key: torch.Tensor,  # [1, KV, T, D]
        value: torch.Tensor,  # [1, KV, T, E]
        site: int,
        sinks: torch.Tensor | None = None,  # [H]
        cosine: torch.Tensor | None = None,  # broadcasts to the query's shape, as does the sine
        sine: torch.Tensor | None = None,
        /,
    ) -> torch.Tensor:
        """Attention call number `site` of a step, whose queries and keys `rotary` turns before → `[1, T, H, E]`."""
        ...


class StepFunction(Protocol):
    """A rank's stage of a step, as `Stage` is one."""

    @property
    def received(self) -> tuple[Crossing, ...]: ...

    def __call__(
        self, step: Any, inputs: Mapping[str, torch.Tensor], received: Sequence[torch.Tensor] = (), /
    ) -> list[torch.Tensor]: ...


class Sums(Protocol):
    """What the ranks that share every layer do together: see `TensorParallelGroup`."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor: ...

    def all_gather(self, tensor: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor: ...

    def gather(self, tensor: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor | None: ...


class Backend(ABC):
    """One way to compute. What it makes takes hidden states of any number of tokens, and keeps their dtype."""

    name: ClassVar[str]
    quantizations: ClassVar[frozenset[str]] = frozenset()
    """The kinds of integers that its linears multiply by."""
    weights: WeightLayout | None = None
    """How it wants the weights of linears to lie; None: as the checkpoint has them."""

    @abstractmethod
    def make_norm(self, entry: RmsNorm, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """hidden `[..., K]` → the same shape and type, over `weight` `[K]`."""

    @abstractmethod
    def make_linears(self, entry: Linears, tensors: Tensors) -> Callable[..., Any]:
        """For a `LinearLayer`, hidden `[..., I]`, and a residual `[..., O]` to be added if there is one → `[..., O]`.
        For `LinearLayers`, hidden → a tensor of each; for a `GatedLinear`, hidden → `[..., O]`."""

    @abstractmethod
    def make_embedding(self, weight: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        """Token ids `[...]` → their rows `[..., I]` of `weight` `[O, I]`, which a head may share."""

    @abstractmethod
    def rotary(self, hidden: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        """x cos + (-x2, x1) sin for the halves x1 and x2 of x, which is `hidden` `[1, H, T, D]`; the others
        broadcast."""

    @abstractmethod
    def make_attention(
        self,
        sites: Sequence[AttentionSite],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Attention:
        """The attention calls `sites` over memory of their own, of `num_blocks` blocks of `block_size` tokens."""

    @abstractmethod
    def make_gated_sublayer(self, entry: GatedSublayer, tensors: Tensors) -> Sublayer:
        """hidden `[..., I]`, and a residual `[..., O]` to be added if there is one → `[..., O]`."""

    @abstractmethod
    def make_attention_sublayer(self, entry: AttentionSublayer, tensors: Tensors, attention: Any) -> Sublayer:
        """The step, hidden `[1, T, I]`, the angles' cosine and sine `[1, 1, T, D]`, and a residual `[1, T, O]` to be
        added if there is one → `[1, T, O]`. `attention` is the stage's."""

    @abstractmethod
    def make_stack(
        self, entry: SublayerStack, tensors: Tensors, attention: Any, group: TensorParallelGroup
    ) -> Sublayer:
        """The step, hidden `[1, T, K]`, and the angles' cosine and sine `[1, 1, T, D]` → `[1, T, K]`."""

    @abstractmethod
    def choose(self, logits: torch.Tensor, chunks: Sequence[Chunk]) -> list[int]:
        """A step's result of its logits `[R, V]`: see `StepPlan`."""

    def sums(self, group: TensorParallelGroup) -> Sums:
        """How the ranks of `group` add up what each has of a tensor: through their host's memory where they share one,
        else by torch.distributed."""
        return group

    def set_num_threads(self, number: int) -> None:  # noqa: B027 -- torch's are set already
        """How many CPU threads it may compute with; as long as nobody says, the kernels have one."""

    def prepare_steps(self, stage: StepFunction, attention: Attention, *, is_sent_on: bool) -> StepFunction:
        """The stage that is run for each step. `is_sent_on`: whether its outputs may still be read in the next one."""
        return stage

    def settle(self, program: RankProgram, tensors: Tensors) -> None:  # noqa: B027 -- most have nothing to do
        """A rank's weights are loaded, and nothing but its steps comes now."""
