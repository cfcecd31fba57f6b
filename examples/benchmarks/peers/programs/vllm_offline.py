"""vLLM in a plain program, prefix caching off: `python -m peers.programs.vllm_offline FOLDER TENSOR_PARALLEL_SIZE`.

As its manual asks for CPUs, Intel's OpenMP is loaded first where its package brought it, and threads are bound to
cores. It compiles the model, and keeps that in its own cache: the first start takes longer.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from peers.rounds import Answer, serve_rounds


def prepare_environment(tensor_parallel_size: int) -> None:
    """Start this program again where the environment that vLLM is to find is not there yet."""
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // tensor_parallel_size
    ranks = [cores[rank * share : (rank + 1) * share] for rank in range(tensor_parallel_size)]
    wanted = {
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, own)) for own in ranks),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    if openmp.is_file():
        wanted["LD_PRELOAD"] = str(openmp)
    if any(os.environ.get(key) != value for key, value in wanted.items()):
        os.environ.update(wanted)
        os.execv(sys.executable, [sys.executable, "-m", "peers.programs.vllm_offline", *sys.argv[1:]])


class Offline:
    def __init__(self, folder: Path, tensor_parallel_size: int) -> None:
        import vllm  # type: ignore[import-not-found]

        self.about = {"version": vllm.__version__, "load_seconds": None}
        self._sampling = vllm.SamplingParams
        self._engine: Any = vllm.LLM(
            str(folder),
            dtype="bfloat16",
            tensor_parallel_size=tensor_parallel_size,
            max_model_len=1024,
            max_num_seqs=32,
            enable_prefix_caching=False,
        ).llm_engine

    def answer(self, prompts: list[list[int]], streams: int, num_tokens: int) -> list[Answer]:
        """Each stream asks again as soon as it is answered."""
        sampling = self._sampling(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        waiting = list(enumerate(prompts))[::-1]
        token_ids: list[list[int]] = [[] for _ in prompts]
        moments: list[list[float]] = [[] for _ in prompts]

        def ask() -> None:
            number, prompt = waiting.pop()
            self._engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)

        for _ in range(min(streams, len(waiting))):
            ask()
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now = time.perf_counter()
            for output in outputs:
                number, so_far = int(output.request_id), output.outputs[0].token_ids
                moments[number] += [now] * (len(so_far) - len(moments[number]))
                token_ids[number] = list(so_far)
                if output.finished and waiting:
                    ask()
        return [Answer(*each) for each in zip(token_ids, moments, strict=True)]


if __name__ == "__main__":
    size = int(sys.argv[2])
    prepare_environment(size)
    serve_rounds(lambda: Offline(Path(sys.argv[1]), size))
