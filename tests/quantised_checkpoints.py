"""Tiny quantised checkpoints, as those who write them would, and the plain ones that they stand for.

Each kind makes codes of a linear's weight, and says in the plainest way, on whole tensors, which numbers those are. The
package's own way, in blocks and pieces, is not used here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families import ConfigFactory, random_model, tiny
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

INTERMEDIATE = 104  # half of it ends inside a group, a block and a packed word of every kind
_SIZES: dict[str, Any] = {"intermediate_size": INTERMEDIATE, "num_hidden_layers": 2}
GROUP = 8
BLOCK = 24
_MODULES = r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(experts\.\d+\.)?(gate|up|down)_proj)"


@dataclass(frozen=True)
class Coded:
    """What is stored of a weight, by the end of its name behind its module's, and the weight that it is."""

    stored: Tensors
    weight: torch.Tensor


@dataclass(frozen=True)
class Kind:
    """A kind of quantised checkpoint."""

    encode: Callable[[torch.Tensor], Coded]
    """Of a linear's weight `[O, I]`, or of experts' `[E, I, O]`."""
    section: Mapping[str, Any]
    file: str = "config.json"
    """That says it; in config.json as `quantization_config`."""
    config: ConfigFactory = tiny("llama", **_SIZES)
    modules: str = _MODULES
    """Pattern of the names of modules whose weights are encoded; of parameters where `suffix` is empty."""
    suffix: str = ".weight"


def write(folder: Path, plain: Path, kind: Kind, dtype: torch.dtype = torch.bfloat16) -> None:
    """The checkpoint of `kind` in `folder`, and in `plain` the float32 one that it stands for.

    Args:
        dtype: of what is not quantised.
    """
    config = kind.config(dtype=str(dtype).removeprefix("torch."))
    model = random_model(config).to(dtype)
    model.save_pretrained(plain)
    tensors: Tensors = {}
    weights: Tensors = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        module = name.removesuffix(kind.suffix)
        if name.endswith(kind.suffix) and re.fullmatch(kind.modules, module):
            coded = kind.encode(tensor.float())
            tensors |= {f"{module}{end}": stored.contiguous() for end, stored in coded.stored.items()}
            weights[name] = coded.weight.float().contiguous()
        else:
            tensors[name], weights[name] = tensor, tensor.float()
    assert tensors.keys() != weights.keys() or any(tensors[name].dtype != dtype for name in tensors)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**described, "dtype": "float32"}))
    if kind.file == "config.json":
        described["quantization_config"] = kind.section
    else:
        (folder / kind.file).write_text(json.dumps(kind.section))
    (folder / "config.json").write_text(json.dumps(described))


def spread(scales: torch.Tensor, shape: torch.Size, block: tuple[int, ...]) -> torch.Tensor:
    """Of blocks, to the shape of all numbers."""
    for dim, size in enumerate(block):
        scales = scales.repeat_interleave(size, dim=dim).narrow(dim, 0, shape[dim])
    return scales


def largest(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Of each block, the largest absolute value."""
    rows, columns = (-(-size // each) * each for size, each in zip(weight.shape, block, strict=True))
    padded = torch.zeros(rows, columns)
    padded[: weight.shape[0], : weight.shape[1]] = weight.abs()
    return padded.view(rows // block[0], block[0], -1, block[1]).amax(dim=(1, 3))


def fp8(block: tuple[int, int] | None, name: str, scale_dtype: torch.dtype = torch.float32) -> Callable[..., Coded]:
    """Scales of blocks, of rows where a block is a row, or of the whole where it is None."""

    def encode(weight: torch.Tensor) -> Coded:
        own = (1 if block and block[0] == 1 else block[0] if block else weight.shape[0], weight.shape[1])
        own = block if block and block[1] > 0 else own
        scales = (largest(weight, own) / 448).to(scale_dtype)
        if scale_dtype == torch.float8_e8m0fnu:
            scales = (largest(weight, own) / 448).log2().ceil().exp2().to(scale_dtype)
        wide = spread(scales.float(), weight.shape, own)
        codes = (weight / wide).to(torch.float8_e4m3fn)
        stored = {".weight": codes, f".{name}": scales if block else scales.view(())}
        return Coded(stored, codes.float() * wide)

    return encode


def with_input_scale(encode: Callable[[torch.Tensor], Coded], name: str = "input_scale") -> Callable[..., Coded]:
    def encode_both(weight: torch.Tensor) -> Coded:
        coded = encode(weight)
        return Coded({**coded.stored, f".{name}": torch.tensor(0.013)}, coded.weight)

    return encode_both


def in_scales_dtype(encode: Callable[[torch.Tensor], Coded], name: str) -> Callable[..., Coded]:
    """The product rounded to the scales' dtype, as compressed-tensors computes it."""

    def encode_both(weight: torch.Tensor) -> Coded:
        coded = encode(weight)
        return Coded(coded.stored, coded.weight.to(coded.stored[f".{name}"].dtype))

    return encode_both


def int8_rows(weight: torch.Tensor) -> Coded:
    """compressed-tensors' W8A8."""
    scales = (weight.abs().amax(dim=1, keepdim=True) / 127).bfloat16()
    codes = (weight / scales.float()).round().clamp(-128, 127).to(torch.int8)
    return Coded({".weight": codes, ".weight_scale": scales}, codes.bfloat16() * scales)


def pack_words(integers: torch.Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """int32 words along `dim`; `order` says which integer has each place of a word, the lowest first."""
    count = 32 // bits
    own = integers.movedim(dim, -1).long()
    short = -own.shape[-1] % count
    own = torch.nn.functional.pad(own, (0, short)).view(*own.shape[:-1], -1, count)
    own = own[..., list(order)] if order else own
    words = sum(own[..., place] << (bits * place) for place in range(count))
    assert isinstance(words, torch.Tensor)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).movedim(-1, dim).contiguous()


def _affine(weight: torch.Tensor, bits: int, group: int, is_symmetric: bool) -> tuple[torch.Tensor, ...]:
    """Scales `[O, G]` in float32, zero points from 0 on, integers from 0 on."""
    groups = weight.view(weight.shape[0], -1, group)
    most = 2**bits - 1
    if is_symmetric:
        scales = groups.abs().amax(-1) * 2 / most
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = (high - low) / most
        zeros = (-low / scales).round().clamp(1, most)  # GPTQ's first format has no 0
    integers = (groups / scales.unsqueeze(-1) + zeros.unsqueeze(-1)).round().clamp(0, most)
    return scales, zeros, integers.view(weight.shape)


def packed(bits: int, group: int, is_symmetric: bool) -> Callable[..., Coded]:
    """compressed-tensors' pack-quantized."""

    def encode(weight: torch.Tensor) -> Coded:
        own = group if group > 0 else weight.shape[1]
        scales, zeros, integers = _affine(weight, bits, own, is_symmetric)
        scales = scales.bfloat16()
        stored = {
            ".weight_packed": pack_words(integers, bits, 1),
            ".weight_scale": scales,
            ".weight_shape": torch.tensor(weight.shape),
        }
        if not is_symmetric:
            stored[".weight_zero_point"] = pack_words(zeros, bits, 0)
        size = (1, own)
        numbers = integers - spread(zeros, weight.shape, size)
        return Coded(stored, numbers.bfloat16() * spread(scales, weight.shape, size))

    return encode


def gptq(bits: int, is_symmetric: bool, orders: bool, is_first: bool = True) -> Callable[..., Coded]:
    """
    Args:
        orders: whether inputs are grouped by their activations' size, here by chance.
        is_first: whether zero points are stored less one.
    """

    def encode(weight: torch.Tensor) -> Coded:
        num_inputs = weight.shape[1]
        order = torch.randperm(num_inputs) if orders else torch.arange(num_inputs)
        scales, zeros, integers = _affine(weight[:, order], bits, GROUP, is_symmetric)
        scales = scales.half()
        back = order.argsort()
        integers, groups = integers[:, back], (torch.arange(num_inputs) // GROUP)[back]
        stored = {
            ".qweight": pack_words(integers.T, bits, 0),
            ".qzeros": pack_words(zeros.T - int(is_first), bits, 1),
            ".scales": scales.T,
            ".g_idx": groups.to(torch.int32),
        }
        return Coded(stored, (integers - zeros[:, groups]).half() * scales[:, groups])

    return encode


def awq(is_symmetric: bool) -> Callable[..., Coded]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def encode(weight: torch.Tensor) -> Coded:
        scales, zeros, integers = _affine(weight, 4, GROUP, is_symmetric)
        scales = scales.half()
        stored = {
            ".qweight": pack_words(integers.T, 4, 1, order),
            ".qzeros": pack_words(zeros.T, 4, 1, order),
            ".scales": scales.T,
        }
        size = (1, GROUP)
        numbers = integers - spread(zeros, weight.shape, size)
        return Coded(stored, numbers.half() * spread(scales, weight.shape, size))

    return encode


def bnb_int8(weight: torch.Tensor) -> Coded:
    rows = weight.abs().amax(dim=1)
    codes = (weight / rows.unsqueeze(1) * 127).round().to(torch.int8)
    stored = {".weight": codes, ".SCB": rows, ".weight_format": torch.tensor(0, dtype=torch.uint8)}
    return Coded(stored, codes * rows.unsqueeze(1) * 7.874015718698502e-3)


NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
FP4 = (*_FP4, *(-value for value in _FP4))


def bnb_table(table: tuple[float, ...], is_nested: bool, kind: str) -> Callable[..., Coded]:
    def encode(weight: torch.Tensor) -> Coded:
        block, values = 64, torch.tensor(table)
        flat = weight.reshape(-1, block)
        absmax = flat.abs().amax(dim=1)
        state: dict[str, Any] = {
            "quant_type": kind,
            "blocksize": block,
            "dtype": "bfloat16",
            "shape": list(weight.shape),
        }
        stored: Tensors = {}
        if is_nested:
            offset, nested = absmax.mean(), 8
            state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": float(offset)}
            own = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % nested)).view(-1, nested)
            inner, steps = own.abs().amax(dim=1), torch.linspace(-1, 1, 256) ** 3
            codes = ((own / inner.unsqueeze(1)).unsqueeze(-1) - steps).abs().argmin(-1)
            absmax = ((steps[codes] * inner.unsqueeze(1)).view(-1) + float(offset))[: len(absmax)]
            stored = {
                ".weight.absmax": codes.view(-1)[: len(absmax)].to(torch.uint8),
                ".weight.nested_absmax": inner,
                ".weight.nested_quant_map": steps,
            }
        else:
            stored[".weight.absmax"] = absmax
        numbers = ((flat / absmax.unsqueeze(1)).unsqueeze(-1) - values).abs().argmin(-1)
        halves = numbers.view(-1, 2)
        text = json.dumps(state).encode()
        stored |= {
            ".weight": (halves[:, 0] * 16 + halves[:, 1]).to(torch.uint8).unsqueeze(1),
            ".weight.quant_map": values,
            f".weight.quant_state.bitsandbytes__{kind}": torch.tensor(list(text), dtype=torch.uint8),
        }
        return Coded(stored, (values[numbers] * absmax.unsqueeze(1)).bfloat16().view(weight.shape))

    return encode


def mxfp4(experts: torch.Tensor) -> Coded:
    """gpt-oss: `[E, I, O]`, stored as `[E, O, I / 32, 16]`."""
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
    blocks = experts.mT.reshape(*experts.mT.shape[:2], -1, 32)  # [E, O, G, 32]
    exponents = (blocks.abs().amax(-1) / 6).log2().ceil()
    wide = exponents.exp2().unsqueeze(-1)
    codes = ((blocks / wide).unsqueeze(-1) - values).abs().argmin(-1)
    stored = {
        "_blocks": (codes[..., 1::2] * 16 + codes[..., 0::2]).to(torch.uint8),
        "_scales": (exponents + 127).to(torch.uint8),
    }
    return Coded(stored, (values[codes] * wide).flatten(-2).mT)


def _group(num_bits: int, kind: str, strategy: str, **settings: Any) -> dict[str, Any]:
    weights = {
        "num_bits": num_bits,
        "type": kind,
        "strategy": strategy,
        "symmetric": True,
        "dynamic": False,
        **settings,
    }
    return {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}


def _compressed(form: str, **group: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": _group(**group)},
    }


def _gptq(bits: int, **settings: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": True, "sym": True, **settings}


_AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP}
_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
_BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}

KINDS: dict[str, Kind] = {
    "FP8, blocks": Kind(fp8((8, 8), "weight_scale_inv"), {**_FP8, "weight_block_size": [8, 8]}),
    "FP8, blocks, the last ones smaller": Kind(fp8((BLOCK, BLOCK), "weight_scale_inv"), _FP8),
    "FP8, blocks, scales powers of two": Kind(
        fp8((BLOCK, BLOCK), "weight_scale_inv", torch.float8_e8m0fnu), {**_FP8, "scale_fmt": "ue8m0"}
    ),
    "FP8, blocks, experts": Kind(
        fp8((8, 8), "weight_scale_inv"),
        {**_FP8, "weight_block_size": [8, 8]},
        config=tiny("qwen3_moe", **_SIZES, **_EXPERTS),
    ),
    "FP8, tensors, static activations": Kind(
        with_input_scale(fp8(None, "weight_scale")), {"quant_method": "fp8", "activation_scheme": "static"}
    ),
    "FP8, rows (fbgemm)": Kind(
        fp8((1, -1), "weight_scale"), {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
    ),
    "FP8, tensors (ModelOpt)": Kind(
        with_input_scale(fp8(None, "weight_scale")),
        {
            "producer": {"name": "modelopt"},
            "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]},
        },
        file="hf_quant_config.json",
    ),
    "FP8, rows (compressed-tensors)": Kind(
        in_scales_dtype(fp8((1, -1), "weight_scale", torch.bfloat16), "weight_scale"),
        _compressed("float-quantized", num_bits=8, kind="float", strategy="channel"),
    ),
    "int8, rows (compressed-tensors)": Kind(
        int8_rows, _compressed("int-quantized", num_bits=8, kind="int", strategy="channel")
    ),
    "int4, groups (compressed-tensors)": Kind(
        packed(4, GROUP, True),
        _compressed("pack-quantized", num_bits=4, kind="int", strategy="group", group_size=GROUP),
    ),
    "int4, groups with zero points (compressed-tensors)": Kind(
        packed(4, GROUP, False),
        _compressed("pack-quantized", num_bits=4, kind="int", strategy="group", group_size=GROUP, symmetric=False),
    ),
    "int8, rows, packed (compressed-tensors)": Kind(
        packed(8, -1, True), _compressed("pack-quantized", num_bits=8, kind="int", strategy="channel")
    ),
    "GPTQ, 4 bits": Kind(gptq(4, True, False), _gptq(4, desc_act=False)),
    "GPTQ, 4 bits, act-order": Kind(gptq(4, True, True), _gptq(4)),
    "GPTQ, 4 bits, zero points": Kind(gptq(4, False, False), _gptq(4, sym=False, desc_act=False)),
    "GPTQ, 8 bits": Kind(gptq(8, True, False), _gptq(8, desc_act=False), file="quantize_config.json"),
    "GPTQ, second format": Kind(gptq(4, False, True, is_first=False), _gptq(4, sym=False, checkpoint_format="gptq_v2")),
    "AWQ": Kind(awq(False), {**_AWQ, "zero_point": True}),
    "AWQ, no zero points": Kind(awq(True), {**_AWQ, "zero_point": False}),
    "bitsandbytes, int8": Kind(bnb_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "bitsandbytes, nf4, quantised twice": Kind(bnb_table(NF4, True, "nf4"), {**_BNB4, "bnb_4bit_quant_type": "nf4"}),
    "bitsandbytes, fp4": Kind(bnb_table(FP4, False, "fp4"), {**_BNB4, "bnb_4bit_quant_type": "fp4"}),
    "MXFP4 (gpt-oss)": Kind(
        mxfp4,
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
        config=tiny("gpt_oss", **{**_SIZES, "intermediate_size": 64}, num_local_experts=4, num_experts_per_tok=2),
        modules=r"model\.layers\.\d+\.mlp\.experts\.(gate_up|down)_proj",
        suffix="",
    ),
}
