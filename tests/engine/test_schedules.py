"""500 random schedules at once of all that can happen to requests: no block is leaked, lost, or given away twice."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import event, given, settings
from hypothesis import strategies as st
from test_scheduler import SlotRunner, answer

from ts_parallel.engine.block_manager import BlockManager
from ts_parallel.engine.engine import Engine
from ts_parallel.engine.pacing import PrefillPacer
from ts_parallel.engine.request import Request
from ts_parallel.engine.scheduler import Scheduler, TokenOutput


@dataclass(frozen=True)
class Add:
    """A request whose prompt begins as others may: with `beginning`, an endless row of one number."""

    beginning: int
    num_shared: int
    num_own: int
    max_tokens: int
    priority: int


@dataclass(frozen=True)
class Abort:
    index: int


@dataclass(frozen=True)
class Step:
    """One step in which some requests are paused: those whose bits are set."""

    paused: int


ADD = st.builds(Add, st.integers(0, 1), st.integers(0, 12), st.integers(0, 6), st.integers(1, 10), st.integers(0, 2))
STEP = st.builds(Step, st.sampled_from([0, 0, 0, 1, 2, 5, 63]))
MOVES = st.one_of(ADD, ADD, STEP, STEP, STEP, st.builds(Abort, st.integers(0, 9)))


@st.composite
def engines(draw: st.DrawFn) -> tuple[Engine, BlockManager]:
    """Few blocks, small steps, one to four stages, with and without memory of prefixes and pacing of prompts."""
    block_size, num_stages = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    blocks = BlockManager(
        draw(st.integers(3, 12)), block_size, caches_prefixes=draw(st.sampled_from([True, True, False]))
    )
    scheduler = Scheduler(
        blocks,
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.integers(1, 12)),
        num_stages=num_stages,
        pacer=PrefillPacer(1.5) if draw(st.booleans()) else None,
    )
    return Engine(SlotRunner(block_size, num_stages), scheduler), blocks


class Run:
    """An engine and the requests that it was given; plays one move after the other and looks after each."""

    def __init__(self, engine: Engine, blocks: BlockManager) -> None:
        self.engine, self.blocks = engine, blocks
        self.room = blocks.num_blocks * blocks.block_size
        self.added: list[Request] = []
        self.aborted: set[Request] = set()
        self.outputs: list[TokenOutput] = []

    def play(self, move: Add | Abort | Step) -> None:
        if isinstance(move, Add):
            self.add(move)
        elif isinstance(move, Abort) and move.index < len(self.added):
            self.engine.abort(str(move.index))
            if not self.added[move.index].finish_reason():
                self.aborted.add(self.added[move.index])
        elif isinstance(move, Step):
            paused = {str(index) for index in range(len(self.added)) if move.paused >> index % 6 & 1}
            self.engine.step(paused, self.outputs.extend)
        self.look()

    def add(self, move: Add) -> None:
        index = len(self.added)
        prompt = (move.beginning,) * move.num_shared + tuple(range(10 + 100 * index, 10 + 100 * index + move.num_own))
        if prompt and len(prompt) < self.room:
            max_tokens = min(move.max_tokens, self.room - len(prompt))
            self.added.append(Request(str(index), prompt, max_tokens, priority=move.priority))
            self.engine.add(self.added[-1])

    def look(self) -> None:
        """Each block is free, or held by requests that agree on all tokens up to its end."""
        held: dict[int, tuple[int, ...]] = {}
        for request in self.added:
            assert max(Counter(request.block_ids).values(), default=0) <= 1
            assert not request.block_ids or request not in self.aborted
            for index, block in enumerate(request.block_ids):
                tokens = request.token_ids(0, (index + 1) * self.blocks.block_size)
                assert held.setdefault(block, tokens) == tokens
        assert len(held) == self.blocks.num_blocks - self.blocks.num_free

    def finish(self) -> None:
        for _ in range(4000):
            if not self.engine.has_requests:
                return
            self.play(Step(0))
        raise AssertionError("some requests never end")


@settings(max_examples=500, deadline=None)
@given(made=engines(), moves=st.lists(MOVES, min_size=12, max_size=50))
def test_no_schedule_leaks_a_block_or_frees_one_twice(
    made: tuple[Engine, BlockManager], moves: list[Add | Abort | Step]
) -> None:
    run = Run(*made)
    for move in moves:
        run.play(move)
    run.finish()
    assert run.blocks.num_free == run.blocks.num_blocks
    whole = Request("whole", (0,) * run.room, 1)  # gets every block once, so none is in the free list twice
    run.blocks.hold(whole, run.room)
    assert sorted(whole.block_ids) == list(range(run.blocks.num_blocks))
    figures = run.engine.figures().stats
    for name, happened in (("preempted", figures.num_preemptions), ("prefix hit", figures.num_prefix_hits)):
        event(f"{name}: {happened > 0}")
    for request in run.added:
        tokens = [output.token_id for output in run.outputs if output.request_id == request.request_id]
        wanted = answer(request.prompt_ids, request.max_tokens)
        assert tokens == (wanted[: len(tokens)] if request in run.aborted else wanted)
