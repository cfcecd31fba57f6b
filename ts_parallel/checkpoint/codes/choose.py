"""Which format a checkpoint's section of quantisation means, and the index with weights in place of codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ts_parallel.checkpoint.codes.kinds.awq import Awq
from ts_parallel.checkpoint.codes.kinds.bitsandbytes import BitsAndBytes
from ts_parallel.checkpoint.codes.kinds.compressed_tensors import CompressedTensors
from ts_parallel.checkpoint.codes.kinds.fp8 import Fp8
from ts_parallel.checkpoint.codes.kinds.gptq import Gptq
from ts_parallel.checkpoint.codes.kinds.mxfp4 import Mxfp4
from ts_parallel.checkpoint.codes.kinds.scheme import Scheme
from ts_parallel.checkpoint.stored import CheckpointIndex, StoredTensor
from ts_parallel.errors import CheckpointError

_BY_METHOD: Mapping[str, type[Scheme]] = {
    "awq": Awq,
    "bitsandbytes": BitsAndBytes,
    "compressed-tensors": CompressedTensors,
    "fbgemm_fp8": Fp8,
    "fp8": Fp8,
    "gptq": Gptq,
    "modelopt": Fp8,
    "mxfp4": Mxfp4,
}
# Sections that name no method, by a key that one of them alone has.
_BY_KEY: Mapping[str, str] = {
    "w_bit": "awq",
    "q_group_size": "awq",
    "desc_act": "gptq",
    "load_in_4bit": "bitsandbytes",
    "load_in_8bit": "bitsandbytes",
    "config_groups": "compressed-tensors",
}
_MODELOPT = ("FP8",)


def parse_section(section: Any, said: str) -> Scheme | None:
    """What a section of quantisation means; None where no format that is read here has such a one.

    Args:
        said: where it stands.

    Raises:
        CheckpointError: it has a key or value of its format that is not read.
    """
    if not isinstance(section, dict):
        return None
    method = section.get("quant_method")
    if method is None:
        method = next((known for key, known in _BY_KEY.items() if key in section), None)
    if method is None and section.get("quant_algo") in _MODELOPT:
        method = "modelopt"
    kind = _BY_METHOD.get(str(method))
    return None if kind is None else kind.parse(section, said)


def with_weights(index: CheckpointIndex, scheme: Scheme, said: str, dtype: torch.dtype) -> CheckpointIndex:
    """The index with a weight in place of the codes, scales and tables that make it up.

    Args:
        said: where the checkpoint says that it is quantised so.
        dtype: what its configuration says that weights are.

    Raises:
        CheckpointError: a tensor is missing or of another shape than the format's, or there is none of it.
    """
    found: dict[str, StoredTensor | None] = {}
    for made in scheme.make(index, dtype):
        found |= dict.fromkeys(made.uses)
        if made.weight is not None:
            found[made.uses[0]] = replace(made.weight, form=str(scheme))  # stands where the largest of them did
    if index and not any(found.values()):
        raise CheckpointError(f"{said}, and none of the tensors beside it is: remove that section if it is not so")
    weights = [found.get(name, stored) for name, stored in index.items()]
    return {stored.name: stored for stored in weights if stored is not None}
