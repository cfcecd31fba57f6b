"""One rank's model, run a step at a time."""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import replace

import torch

from ts_parallel.errors import ConfigError, PlanError
from ts_parallel.partition.load import RankModel
from ts_parallel.partition.program import POSITIONS, ROWS, TOKEN_IDS, RankProgram
from ts_parallel.runtime.backends.base import Attention, Backend, StepFunction
from ts_parallel.runtime.backends.packed_plan import as_tensor
from ts_parallel.runtime.channel import StepChannel
from ts_parallel.runtime.kv_budget import count_blocks
from ts_parallel.runtime.stage import Stage
from ts_parallel.step_plan import Chunk, StepPlan
from ts_parallel.topology import TensorParallelGroup, Topology


class Runner:
    """Owns this rank's model and KV memory. The leader, rank 0, submits steps and collects results; others `follow`.

    The first rank of the last stage chooses the tokens. It tells the leader of every step, also of one without tokens:
    so nobody runs ahead of the pipeline by more than there are stages.
    """

    def __init__(
        self,
        part: RankModel,
        topology: Topology,
        backend: Backend,
        *,
        block_size: int,
        kv_cache_bytes: int,
        max_model_len: int,
    ) -> None:
        program, dtype = part.program, part.program.dtype
        refuse_unpageable(program, max_model_len)
        self.num_blocks = count_blocks(program.kv_elements_of_ranks, dtype, block_size, kv_cache_bytes, max_model_len)
        self.block_size = block_size
        self.dtype = dtype
        self._topology = topology
        self._group = topology.tensor_parallel
        self._device = topology.device
        self._weights = (part.num_bytes, part.seconds)
        self._channel = StepChannel(topology)
        self._submitted: deque[tuple[StepPlan, list[int] | None]] = deque()  # with the result where it is here
        self._head = program.head_sizes
        self._vocabulary = sum(self._head)
        sites = program.sites_of_ranks[topology.stage]
        self._backend = backend
        self._sums = backend.sums(self._group)
        self._attention = backend.make_attention(sites, self.num_blocks, block_size, dtype, topology.device)
        self._topology.use_device()
        self._stage = _make_stage(part, self._group, backend, self._attention, is_sent_on=topology.num_stages > 1)
        backend.settle(part.program, part.tensors)

    @property
    def weights(self) -> str:
        """What this rank has loaded, for its log."""
        num_bytes, seconds = self._weights
        return f"{num_bytes / 2**20:.0f} MiB of weights in {seconds:.2f} s"

    @property
    def num_stages(self) -> int:
        """How many steps can be at work at once."""
        return self._topology.num_stages

    def submit(self, plan: StepPlan) -> None:
        """The leader: start one step on all ranks. To be collected, unless it has no chunks; at most `num_stages` are
        without result at any time."""
        assert not plan.wants_logits, "those are numbers of another type: see `logits`"
        self._channel.send_plan(plan)
        if plan.chunks:
            self._submitted.append((plan, self._run_step(plan)))

    def collect(self) -> list[int]:
        """The leader: wait for the oldest step submitted; its result's numbers (`StepPlan`)."""
        plan, numbers = self._submitted.popleft()
        if numbers is None:
            numbers = self._channel.receive_result((_num_results(plan),), torch.int64).tolist()
        return numbers[: plan.num_results]

    def logits(self, plan: StepPlan) -> torch.Tensor:
        """The leader, with nothing submitted: run one step; the float32 logits `[R, V]` of its sampled chunks."""
        assert not self._submitted, "the oldest step's result comes first"
        plan = replace(plan, wants_logits=True)
        self._channel.send_plan(plan)
        logits = self._run_stage(plan)
        if logits is None:
            return self._channel.receive_result((len(_sampled(plan)), self._vocabulary), torch.float32)
        return logits.to(torch.float32, copy=True)  # a backend may use the memory for its next step

    def follow(self) -> None:
        """Other ranks: run the leader's steps until its last."""
        while not (plan := self._channel.receive_plan()).is_last:
            if plan.chunks:
                self._run_step(plan)
        self._channel.flush()

    def stop_followers(self) -> None:
        """The leader, with nothing submitted: end the others, which have heard of it when this returns."""
        self._channel.send_plan(StepPlan(is_last=True))
        self._channel.flush()

    @torch.inference_mode()
    def _run_step(self, plan: StepPlan) -> list[int] | None:
        """This rank's part of a step. The result's numbers where the leader has them itself; else they come to it."""
        logits = self._run_stage(plan)
        if logits is None:
            return None
        if plan.wants_logits:
            self._channel.send_result(logits.float())
            return None
        numbers = self._backend.choose(logits, plan.chunks)
        if self._topology.rank == 0:
            return numbers
        self._channel.send_result(torch.tensor(numbers or [0]))
        return None

    @torch.inference_mode()
    def _run_stage(self, plan: StepPlan) -> torch.Tensor | None:
        """This rank's stage of a step: the logits `[R, V]` where it is the first rank of the last one."""
        check_plan(plan, self.num_blocks, self.block_size, self._vocabulary)
        self._topology.use_device()
        layout = self._attention.lay_out(plan)
        inputs = {TOKEN_IDS: layout.token_ids, POSITIONS: layout.positions, ROWS: layout.sampled_rows}
        sizes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        received = self._channel.receive_inward(
            [(crossing.shape(sizes), crossing.dtype) for crossing in self._stage.received]
        )
        outputs = self._stage(layout, inputs, received)
        if self._topology.stage < self.num_stages - 1:
            self._channel.send_onward(outputs)
            return None
        logits = outputs[0][0]
        if len(logits) != (num_rows := plan.num_rows):  # the step was filled up to a size
            logits = logits[:num_rows]
        return self._gather_vocabulary(logits)

    def _gather_vocabulary(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Every rank's `[R, V / ranks]` → `[R, V]` on the first of the stage, None on the others."""
        if len(self._head) == 1:  # each rank has all of them
            return logits if self._group.rank == 0 else None
        return self._sums.gather(logits, self._head)


def check_plan(plan: StepPlan, num_blocks: int, block_size: int, vocabulary: int) -> None:
    """Assert of all that becomes an address that it is one: the kernels of no backend look.

    Token ids are below `vocabulary`, block ids below `num_blocks`, a chunk lies within its blocks, and its rows are
    tokens of its own. Who made a plan has seen to it (`Vocabulary.known`, `BlockManager.hold`); here ends what went
    wrong on the way.
    """
    block_ids = array("q")
    for chunk in plan.chunks:
        num_slots, num_rows = len(chunk.block_ids) * block_size, len(chunk.next_ids)
        assert 0 <= chunk.start < chunk.end <= num_slots, f"tokens {chunk.start} to {chunk.end} have {num_slots} slots"
        assert num_rows <= len(chunk.token_ids), f"{num_rows} rows of {len(chunk.token_ids)} tokens are wanted"
        token_ids = (*chunk.token_ids, *chunk.next_ids)
        assert min(token_ids) >= 0, f"token id {min(token_ids)} is negative"
        assert max(token_ids) < vocabulary, f"token id {max(token_ids)} is not below {vocabulary}"
        block_ids.extend(chunk.block_ids)
    if block_ids:
        first, last = (int(bound) for bound in as_tensor(block_ids).aminmax())
        assert 0 <= first and last < num_blocks, f"block ids {first} to {last} are not within 0 to {num_blocks - 1}"


def _sampled(plan: StepPlan) -> list[Chunk]:
    return [chunk for chunk in plan.chunks if chunk.is_sampled]


def _num_results(plan: StepPlan) -> int:
    """A step without results has one that means nothing."""
    return max(1, plan.num_results)


def _make_stage(
    part: RankModel, group: TensorParallelGroup, backend: Backend, attention: Attention, *, is_sent_on: bool
) -> StepFunction:
    if part.model is None:
        (code,) = part.program.stages
        stage = Stage(code, part.tensors, group, backend, attention)
        return backend.prepare_steps(stage, attention, is_sent_on=is_sent_on)
    from ts_parallel.runtime.eager_stage import EagerStage  # and with it transformers, which no other rank needs

    return EagerStage(part.model, attention)


def refuse_unpageable(program: RankProgram, max_model_len: int) -> None:
    """Raise for what would run, and answer wrongly.

    Raises:
        ConfigError: rotary frequencies that depend on the longest sequence of a batch, at a length where they change.
        PlanError: attention with sinks, or no head.
    """
    if not program.head_sizes:
        raise PlanError(f"{program.architecture} has no head whose logits could be sampled from")
    if any(site.has_sinks for sites in program.sites_of_ranks for site in sites):
        raise PlanError(
            f"{program.architecture} has attention sinks, which eager modules are not given: set eager to false"
        )
    if program.changing_rope is None:
        return
    kind, trained = program.changing_rope
    if max_model_len > trained:
        raise ConfigError(
            f"rope_type {kind!r} changes with the longest sequence of a batch beyond {trained} tokens: "
            f"set max_model_len, now {max_model_len}, to at most {trained}"
        )
