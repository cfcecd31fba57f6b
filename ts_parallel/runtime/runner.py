"""One rank's model, run a step at a time."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ts_parallel.errors import ConfigError, PlanError
from ts_parallel.partition.attention_sites import attach, forward_arguments
from ts_parallel.partition.build import RankModel
from ts_parallel.partition.plan import ParameterPlan
from ts_parallel.runtime.channel import StepChannel
from ts_parallel.runtime.kv_memory import KVMemory, count_blocks
from ts_parallel.runtime.paged_attention import PagedAttention, lay_out
from ts_parallel.runtime.sampling import sample
from ts_parallel.runtime.step import StepPlan
from ts_parallel.topology import Topology

_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


class Runner:
    """Owns this rank's model and KV memory. Rank 0 leads with `run`, the others `follow`."""

    def __init__(
        self, part: RankModel, topology: Topology, *, block_size: int, kv_cache_bytes: int, max_model_len: int
    ) -> None:
        refuse_unpageable(part, max_model_len)
        dtype = part.model.dtype
        self.num_blocks = count_blocks(part.sites, dtype, block_size, kv_cache_bytes, max_model_len)
        self.block_size = block_size
        self._part = part
        self._group = topology.tensor_parallel
        self._device = topology.device
        self._attention = PagedAttention(KVMemory(part.sites, self.num_blocks, block_size, dtype, topology.device))
        self._channel = StepChannel(topology.world_size)
        self._head = _head_plan(part)
        attach(part.model, self._attention)

    @property
    def weights(self) -> str:
        """What this rank has loaded, for its log."""
        return (
            f"{self._part.plan.local_bytes(self._group.rank) / 2**20:.0f} MiB of weights in {self._part.seconds:.2f} s"
        )

    def run(self, plan: StepPlan) -> list[int]:
        """Rank 0: run one step on all ranks; the token chosen for each sampled chunk, in the plan's order."""
        self._channel.send(plan)
        sampled = [chunk for chunk in plan.chunks if chunk.is_sampled]
        logits = self._forward(plan) if plan.chunks else None
        if logits is None or not sampled:
            return []
        return sample(logits, [chunk.sampling for chunk in sampled], [chunk.end for chunk in sampled])

    def logits(self, plan: StepPlan) -> torch.Tensor:
        """Rank 0: run one step on all ranks; the logits `[R, V]` of its sampled chunks."""
        self._channel.send(plan)
        logits = self._forward(plan)
        assert logits is not None
        return logits

    def follow(self) -> None:
        """Other ranks: run rank 0's steps until its last."""
        while not (plan := self._channel.receive()).is_last:
            if plan.chunks:
                self._forward(plan)

    def stop_followers(self) -> None:
        self._channel.send(StepPlan(is_last=True))

    @torch.inference_mode()
    def _forward(self, plan: StepPlan) -> torch.Tensor | None:
        """The stage's part of a step; on rank 0 the logits of the sampled rows."""
        layout = lay_out(plan, self.block_size, self._device)
        self._attention.begin(layout)
        output = self._part.model(
            **forward_arguments(layout.token_ids, layout.positions), logits_to_keep=layout.sampled_rows
        )
        return self._gather_vocabulary(output.logits[0])

    def _gather_vocabulary(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Every rank's `[R, V / ranks]` → rank 0's `[R, V]`."""
        if self._head.slices is None or not len(logits):
            return logits
        sizes = [kept.length for kept in self._head.slices]
        padded = torch.nn.functional.pad(logits, (0, max(sizes) - logits.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in sizes] if self._group.rank == 0 else None
        dist.gather(padded, parts, group_dst=0, group=self._group.process_group)
        return None if parts is None else torch.cat([p[:, :size] for p, size in zip(parts, sizes, strict=True)], dim=-1)


def _head_plan(part: RankModel) -> ParameterPlan:
    """The parameter that the head multiplies with: its own, or the embedding's where they are tied."""
    head = part.model.get_output_embeddings()
    name = next(name for name, module in part.model.named_modules() if module is head) + ".weight"
    return next(entry for entry in part.plan.parameters.values() if name in (entry.name, *entry.aliases))


def refuse_unpageable(part: RankModel, max_model_len: int) -> None:
    """Raise for what would run, and answer wrongly.

    Raises:
        ConfigError: rotary frequencies that depend on the longest sequence of a batch, at a length where they change.
        PlanError: attention with sinks.
    """
    config = part.model.config.get_text_config()
    if any(site.has_sinks for site in part.sites):
        raise PlanError(f"{type(part.model).__name__} has attention sinks, which the paged attention cannot do yet")
    rope = getattr(config, "rope_parameters", None) or {}
    trained = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    if rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE and max_model_len > trained:
        raise ConfigError(
            f"rope_type {rope['rope_type']!r} changes with the longest sequence of a batch beyond {trained} tokens: "
            f"set max_model_len, now {max_model_len}, to at most {trained}"
        )
