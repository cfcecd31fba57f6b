from typing import Any

def is_supported() -> bool: ...
def set_num_threads(number: int, /) -> None: ...
def get_num_threads() -> int: ...
def pack(panels: int, rows: int, num_rows: int, num_inputs: int, stride: int, /) -> bool: ...
def code(panels: int, rows: int, num_rows: int, num_inputs: int, stride: int, /) -> int: ...
def coded_panel_bytes(num_pairs: int, /) -> int: ...
def keep_plain(coded_panel: int, panel: int, /) -> None: ...
def quantize(
    kind: int,
    panels: int,
    scales: int,
    inputs_a_group: int,
    rows: int,
    num_rows: int,
    num_inputs: int,
    stride: int,
    /,
) -> None: ...
def embedding(num_inputs: int, rows: int, num_rows: int, output: int, /, *part: int) -> None: ...
def make_linear(num_inputs: int, activation: int, /, *parts: int) -> Any: ...
def linear(layer: Any, hidden: int, stride: int, num_tokens: int, residual: int, /, *outputs: int) -> None: ...
def rms_norm(
    hidden: int,
    weight: int,
    output: int,
    num_rows: int,
    width: int,
    is_offset: int,
    epsilon: float,
    /,
) -> None: ...
def rotary(
    hidden: int,
    token_stride: int,
    head_stride: int,
    num_tokens: int,
    num_heads: int,
    head_dim: int,
    cosine: int,
    sine: int,
    output: int,
    /,
) -> None: ...
def argmax(logits: int, num_rows: int, num_columns: int, result: int, /) -> None: ...
def sample(logits: int, num_columns: int, result: int, rows: bytes, words: bytes, /) -> None: ...
def make_site(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    window: int,
    keys: int,
    values: int,
    sinks: int,
    scaling: float,
    softcap: float,
    /,
) -> Any: ...
def make_step(block_size: int, num_tokens: int, chunks: bytes, blocks: bytes, /) -> Any: ...
def attention(site: Any, step: Any, cosine: int, sine: int, /, *heads: int) -> None: ...
def make_sublayer(weight: int, is_offset: int, epsilon: float, first: Any, last: Any, site: Any, /) -> Any: ...
def run_sublayer(
    sublayer: Any,
    step: Any,
    cosine: int,
    sine: int,
    hidden: int,
    num_tokens: int,
    residual: int,
    output: int,
    /,
) -> None: ...
def run_stack(
    sublayers: tuple[Any, ...],
    step: Any,
    cosine: int,
    sine: int,
    hidden: int,
    num_tokens: int,
    output: int,
    team: Any,
    /,
) -> None: ...
