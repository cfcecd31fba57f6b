"""Arguments that several sub-commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Folder of a Hugging Face checkpoint, or the id of one on the hub.")]
TensorParallelSize = Annotated[int, typer.Option(min=1, help="Ranks that share every layer.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
MaxModelLen = Annotated[
    int | None, typer.Option(min=2, help="Most tokens of a request [default: the model's own limit].")
]
KVCacheMemory = Annotated[str, typer.Option(help="KV cache of each rank, such as 2GiB.")]
