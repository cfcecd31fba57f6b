"""Which codes are small integers with scales, and that those stand for the weights, wherever a rank cuts them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf_files import GGUF_KINDS, write_gguf
from quantised_checkpoints import GROUP, KINDS, write
from safetensors.torch import load_file

from ts_parallel.checkpoint.codes.blocks import CodesReader, read_whole
from ts_parallel.checkpoint.codes.integers import row_integers_of
from ts_parallel.checkpoint.index import read_index
from ts_parallel.checkpoint.stored import Slice

WHOLE = 0
SMALL = {
    "int8, rows (compressed-tensors)": (8, WHOLE, torch.bfloat16),
    "int8, rows, packed (compressed-tensors)": (8, WHOLE, torch.bfloat16),
    "int4, groups (compressed-tensors)": (4, GROUP, torch.bfloat16),
    "GPTQ, 4 bits": (4, GROUP, torch.float16),
    "GPTQ, 8 bits": (8, GROUP, torch.float16),
    "AWQ, no zero points": (4, GROUP, torch.float16),
    "bitsandbytes, int8": (8, WHOLE, torch.float32),
    "GGUF Q4_0": (4, 32, torch.float16),
    "GGUF Q5_0": (5, 32, torch.float16),
    "GGUF Q8_0": (8, 32, torch.float16),
    "GGUF Q4_0, qwen3": (4, 32, torch.float16),
}
"""Kind → bits of its integers, inputs that share a scale, the scales' dtype."""


def write_kind(root: Path, kind: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """The checkpoint's folder, and the weights that it stands for."""
    if kind in GGUF_KINDS:
        write_gguf(root / "own", root / "plain", GGUF_KINDS[kind])
    else:
        write(root / "own", root / "plain", KINDS[kind])
    return root / "own", load_file(root / "plain" / "model.safetensors")


@pytest.mark.parametrize("kind", SMALL)
def test_integers_times_scales_are_the_weight(kind: str, tmp_path: Path) -> None:
    folder, weights = write_kind(tmp_path, kind)
    num_bits, group, dtype = SMALL[kind]
    coded = [own for own in read_index(folder).values() if own.codes and ".layers.0." in own.name]
    assert coded
    for stored in coded:
        own = row_integers_of(stored)
        assert own is not None
        assert (own.num_bits, own.group) == (num_bits, group or stored.shape[1])
        integers, scales = read_whole(own.integers), read_whole(own.scales)
        assert (integers.dtype, scales.dtype) == (torch.int8, dtype)
        least, most = int(integers.min()), int(integers.max())
        assert -(2 ** (num_bits - 1)) <= least < 0 < most < 2 ** (num_bits - 1)
        wide = scales.float().repeat_interleave(own.group, dim=1)[:, : stored.shape[1]]
        product = integers.float() * wide
        if kind.startswith("bitsandbytes"):  # multiplies in another order
            torch.testing.assert_close(product, weights[stored.name], rtol=2**-22, atol=0)
        else:
            own_dtype = torch.float32 if kind.startswith("GGUF") else dtype
            assert torch.equal(product.to(own_dtype).float(), weights[stored.name]), stored.name


@pytest.mark.parametrize(
    "kind",
    [kind for kind in (*KINDS, "GGUF Q4_1", "GGUF Q6_K", "GGUF F16") if kind not in SMALL],
)
def test_other_codes_are_none(kind: str, tmp_path: Path) -> None:
    folder, _ = write_kind(tmp_path, kind)
    assert not any(row_integers_of(stored) for stored in read_index(folder).values())


def test_scales_of_a_part_are_those_of_its_columns(tmp_path: Path) -> None:
    folder, weights = write_kind(tmp_path, "GPTQ, 4 bits")
    stored = read_index(folder)["model.layers.0.mlp.down_proj.weight"]  # 104 inputs in groups of 8
    own = row_integers_of(stored)
    assert own is not None
    cases = {(0, 104): 8, (0, 52): 8, (48, 56): 8, (52, 52): None, (50, 6): 6, (51, 20): None}
    for columns, group in cases.items():
        kept = Slice(1, (columns,))
        assert own.group_of(kept) == group, columns
        if group is None:
            continue
        with CodesReader() as reader:
            scales = own.read_scales((3, 10), columns, group, reader.read)
            integers = reader.read(own.integers, ((3, 10), columns))
        wide = scales.repeat_interleave(group, dim=1)[:, : columns[1]]
        assert torch.equal((integers * wide).float(), weights[stored.name][3:13].narrow(1, *columns))
    assert own.group_of(Slice(1, ((0, 8), (16, 8)))) is None
    assert own.group_of(Slice(0, ((0, 8), (16, 8)))) == own.group_of(None) == 8
