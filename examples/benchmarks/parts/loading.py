"""Load a 4 GB Llama with random weights into two tensor-parallel ranks, beside `dd` and transformers.

The ranks and `dd` take turns, round by round, first with the files out of the page cache, then with them in it; so does
transformers after them, for what it leaves of the memory costs the next one that needs much a fifth of its time.
Medians of all rounds but the first are printed as a Markdown table. A rank's time is that of `load_program`, all ranks
beginning together: memory made, bytes read, weights packed. The model is traced before. `dd` reads all files once, as
the two ranks do together.

A virtual machine that gives its free memory back to the host (free page reporting) waits seconds for each GB that it
takes again, whoever takes it. So right before each of the three begins, untimed, a process of its own takes as much as
the page cache and the weights will need, and ends.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

LAYERS, LAYERS_A_FILE = 9, 3
MODEL = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


def make_model(folder: Path) -> list[Path]:
    """Shards of about 1 GB, each tensor made and written once."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**MODEL, dtype="bfloat16")
    with torch.device("meta"):
        parameters = dict(LlamaForCausalLM(config).named_parameters())
    weight_map = {name: f"model-{file_of(name):05}.safetensors" for name in parameters}
    for file in sorted(set(weight_map.values())):
        own = [name for name in parameters if weight_map[name] == file]
        tensors = {name: torch.empty(parameters[name].shape, dtype=torch.bfloat16).normal_(std=0.02) for name in own}
        save_file(tensors, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(folder)
    return [folder / file for file in sorted(set(weight_map.values()))]


def file_of(name: str) -> int:
    parts = name.split(".")
    return 1 + int(parts[2]) // LAYERS_A_FILE if "layers" in parts else 1 + LAYERS // LAYERS_A_FILE


def load_rank(folder: Path) -> None:
    """One rank of a server; prints its seconds and the most memory that it has had, in MB."""
    import torch.distributed as dist

    from ts_parallel.checkpoint.index import read_index
    from ts_parallel.partition.load import load_program
    from ts_parallel.partition.prepared import prepare_program
    from ts_parallel.partition.program import ONE_STAGE, ProgramRequest
    from ts_parallel.runtime.backends.choose import choose_backend
    from ts_parallel.topology import open_topology

    topology = open_topology(2, "cpu", num_threads=1)
    group, index = topology.tensor_parallel, read_index(folder)
    program = prepare_program(ProgramRequest(folder, "auto", group.rank, group.size, ONE_STAGE), index)
    own = program.plan.local_bytes(group.rank)
    with memory_in_use(own + bytes_of_files(folder) // 2):
        dist.barrier()
    dist.barrier()
    layout = choose_backend(topology.device, program.dtype).weights
    part = load_program(program, index, group, topology.device, layout)
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
    line = json.dumps({"seconds": part.seconds, "peak_mb": peak, "own_mb": own / 1e6})
    os.write(sys.stdout.fileno(), f"{line}\n".encode())
    topology.close()


def load_plainly(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    with memory_in_use(2 * bytes_of_files(folder)):
        pass
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    # It maps the files: only what is touched is read.
    total = sum(int(parameter.view(torch.uint8).view(-1)[::4096].sum()) for parameter in model.parameters())
    print(json.dumps({"seconds": time.perf_counter() - started, "touched": total}))


def run(command: list[str], scratch: Path) -> list[dict[str, float]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(scratch)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def bytes_of_files(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@contextmanager
def memory_in_use(num_bytes: int) -> Iterator[None]:
    """Another process has so much memory as long as this lasts."""
    command = [sys.executable, "-S", __file__, "--touch", str(num_bytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        yield
        process.stdin.close()


def touch_memory(num_bytes: int) -> None:
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    for start in range(0, num_bytes, mmap.PAGESIZE):
        memory[start] = 1
    print("touched", flush=True)
    sys.stdin.read()


def read_with_dd(files: list[Path]) -> float:
    with memory_in_use(sum(file.stat().st_size for file in files)):
        pass
    started = time.perf_counter()
    for file in files:
        subprocess.run(["dd", f"if={file}", "of=/dev/null", "bs=8M", "status=none"], check=True)
    return time.perf_counter() - started


def forget(files: list[Path]) -> None:
    """Take the files out of the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("."), help="where to write the model: a disk to be read")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--touch", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.touch:
        return touch_memory(arguments.touch)
    if arguments.rank:
        return load_rank(arguments.rank)
    if arguments.plain:
        return load_plainly(arguments.plain)
    with TemporaryDirectory(prefix="ts-parallel-benchmark-", dir=arguments.folder) as scratch:
        report(Path(scratch), arguments.rounds)
    return None


def report(scratch: Path, rounds: int) -> None:
    folder = scratch / "model"
    folder.mkdir()
    files = make_model(folder)
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ranks += [__file__, "--rank", str(folder)]
    run(ranks, scratch)  # traces the model
    seconds: dict[tuple[str, str], list[float]] = {}
    peaks: list[dict[str, float]] = []
    for names in (("dd", "ranks"), ("transformers",)):
        for state in ("cold", "warm"):
            for number in range(1 + rounds):
                for name in names:
                    if state == "cold":
                        forget(files)
                    if name == "dd":
                        taken = read_with_dd(files)
                    elif name == "ranks":
                        peaks = run(ranks, scratch)
                        taken = max(line["seconds"] for line in peaks)
                    else:
                        taken = run([sys.executable, __file__, "--plain", str(folder)], scratch)[0]["seconds"]
                    if number:
                        seconds.setdefault((state, name), []).append(taken)
    total = sum(file.stat().st_size for file in files) / 1e6
    print(f"\n{date.today()}, {platform.machine()}, {total:.0f} MB, {rounds} rounds, medians\n")
    print(
        "| page cache | dd, s | two ranks, s | ratio | transformers from_pretrained, s | ratio |\n"
        "|---|---|---|---|---|---|"
    )
    for state in ("cold", "warm"):
        dd, ours, plain = (statistics.median(seconds[state, name]) for name in ("dd", "ranks", "transformers"))
        print(f"| {state} | {dd:.2f} | {ours:.2f} | {ours / dd:.2f} | {plain:.2f} | {ours / plain:.2f} |")
    own, peak = max(line["own_mb"] for line in peaks), max(line["peak_mb"] for line in peaks)
    print(f"\npeak memory of a rank {peak:.0f} MB; its part {own:.0f} MB, + 15 % + 350 MB {own * 1.15 + 350:.0f} MB")


if __name__ == "__main__":
    main()
