"""What a module of kernels has to be called by: one of an instruction set and a format of numbers. `kernels.c` says
what each argument is."""

from typing import Any, Protocol

class Kernels(Protocol):
    def set_num_threads(self, number: int, /) -> None: ...
    def get_num_threads(self) -> int: ...
    def pack(self, panels: int, rows: int, num_rows: int, num_inputs: int, stride: int, /) -> bool: ...
    # The next three are of bfloat16 alone.
    def code(self, panels: int, rows: int, num_rows: int, num_inputs: int, stride: int, /) -> int: ...
    def coded_panel_bytes(self, num_pairs: int, /) -> int: ...
    def keep_plain(self, coded_panel: int, panel: int, /) -> None: ...
    def quantize(
        self,
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
    def place(self, kind: int, panels: int, integers: int, num_rows: int, num_inputs: int, stride: int, /) -> None: ...
    def embedding(self, num_inputs: int, rows: int, num_rows: int, output: int, /, *part: int) -> None: ...
    def make_linear(self, num_inputs: int, activation: int, /, *parts: int) -> Any: ...
    def linear(
        self, layer: Any, hidden: int, stride: int, num_tokens: int, residual: int, /, *outputs: int
    ) -> None: ...
    def rms_norm(
        self,
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
        self,
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
    def argmax(self, logits: int, num_rows: int, num_columns: int, result: int, /) -> None: ...
    def sample(self, logits: int, num_columns: int, result: int, rows: bytes, words: bytes, /) -> None: ...
    def make_site(
        self,
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
    def make_step(self, block_size: int, num_tokens: int, chunks: bytes, blocks: bytes, /) -> Any: ...
    def attention(self, site: Any, step: Any, cosine: int, sine: int, /, *heads: int) -> None: ...
    def make_sublayer(
        self, weight: int, is_offset: int, epsilon: float, first: Any, last: Any, site: Any, /
    ) -> Any: ...
    def run_sublayer(
        self,
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
        self,
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
