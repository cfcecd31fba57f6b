"""This package's engine without TorchServe: one process, or the ranks that torchrun starts.

python -m peers.programs.engine FOLDER
torchrun --nproc-per-node 2 -m peers.programs.engine FOLDER

Rank 0 reads the rounds. The prefix cache is off, for the prompts of all rounds are the same.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

from peers.rounds import Answer, serve_rounds
from ts_parallel.cli.server.archive import handler_config
from ts_parallel.config import HandlerConfig
from ts_parallel.engine.engine import SECONDS_BETWEEN_SIGNS_OF_LIFE
from ts_parallel.engine.request import Request
from ts_parallel.engine.scheduler import TokenOutput
from ts_parallel.serving.causal_lm import make_engine, make_runner
from ts_parallel.serving.offline import num_ranks_started
from ts_parallel.topology import Topology, open_topology

_WEIGHTS_LOADED = re.compile(r"of weights in ([\d.]+) s")


def measured_config(folder: Path, tensor_parallel_size: int) -> HandlerConfig:
    """As both the engine alone and the server are measured."""
    return handler_config(
        folder,
        "cpu",
        tensor_parallel_size=tensor_parallel_size,
        max_model_len=1024,
        kv_cache_memory="256MiB",
        enable_prefix_caching=False,
    )


def load_seconds(text: str) -> float | None:
    """Of the slowest rank that `text`, a log or `Runner.weights`, names; None where it names none."""
    return max(map(float, _WEIGHTS_LOADED.findall(text)), default=None)


class LoadedEngine:
    """Rank 0. Owns the engine, and a thread that keeps the other ranks patient between two rounds."""

    def __init__(self, config: HandlerConfig, folder: Path, topology: Topology) -> None:
        self._runner = make_runner(config, folder, topology)
        self._engine = make_engine(self._runner, config)
        self._engine_free = threading.Lock()
        self.about = {"version": version("ts-parallel"), "load_seconds": load_seconds(self._runner.weights)}
        if topology.world_size > 1:
            threading.Thread(target=self._give_signs_of_life, daemon=True).start()

    def _give_signs_of_life(self) -> None:
        while True:
            time.sleep(SECONDS_BETWEEN_SIGNS_OF_LIFE)
            with self._engine_free:
                self._engine.sign_of_life()

    def answer(self, prompts: list[list[int]], streams: int, num_tokens: int) -> list[Answer]:
        """Each stream asks again as soon as it is answered."""
        requests = [Request(str(number), tuple(prompt), num_tokens) for number, prompt in enumerate(prompts)]
        moments: dict[str, list[float]] = {request.request_id: [] for request in requests}
        waiting = requests[::-1]

        def deliver(outputs: list[TokenOutput]) -> None:
            now = time.perf_counter()
            for output in outputs:
                moments[output.request_id].append(now)
                if output.finish_reason is not None and waiting:
                    self._engine.add(waiting.pop())

        with self._engine_free:
            for _ in range(min(streams, len(waiting))):
                self._engine.add(waiting.pop())
            while self._engine.has_requests:
                self._engine.step(deliver=deliver)
        return [Answer(request.output_ids, moments[request.request_id]) for request in requests]

    def close(self) -> None:
        """End the ranks that follow; nothing is said to them from here on."""
        self._engine_free.acquire()
        self._runner.stop_followers()


def main(folder: Path) -> None:
    config = measured_config(folder, num_ranks_started())
    topology = open_topology(config.tensor_parallel_size, config.device)
    if topology.rank == 0:
        serve_rounds(lambda: LoadedEngine(config, folder, topology), LoadedEngine.close)
    else:
        make_runner(config, folder, topology).follow()
    topology.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
