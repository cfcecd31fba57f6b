"""What torch.distributed.checkpoint wrote: each tensor in the chunks that the ranks had. Knows no rank and no group.

`.metadata` is a pickle, which is read as data. It says of each chunk at which bytes of which file it begins; there
stands what torch.save made of it, of which only the headers are read here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ts_parallel.checkpoint.formats.boxes import check_boxes
from ts_parallel.checkpoint.formats.pickles import DataUnpickler, Names, Record
from ts_parallel.checkpoint.formats.torch_files import check_layout, read_torch_archive
from ts_parallel.checkpoint.formats.torch_pickles import PickledTensor
from ts_parallel.checkpoint.stored import NameFinder, StoredPart, StoredTensor
from ts_parallel.errors import CheckpointError

METADATA = ".metadata"


class _TensorRecord(Record):
    pass


_MODULE = "torch.distributed.checkpoint"
_NAMES: Names = {
    (f"{_MODULE}.metadata", "TensorStorageMetadata"): _TensorRecord,
    **{
        (f"{_MODULE}.metadata", name): Record
        for name in (
            *("Metadata", "MetadataIndex", "ChunkStorageMetadata", "BytesStorageMetadata"),
            *("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
        )
    },
    (f"{_MODULE}.filesystem", "_StorageInfo"): Record,
}

_Corner = tuple[int, ...]


@dataclass(frozen=True)
class _Chunk:
    """A part as the metadata describes it: a box of the tensor `key`, in `length` bytes of a file."""

    key: str
    dtype: torch.dtype
    corner: _Corner
    shape: tuple[int, ...]
    file: Path
    start: int
    length: int


@dataclass(frozen=True)
class _Described:
    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: tuple[tuple[_Corner, tuple[int, ...]], ...]


def read_distributed(folder: Path, find_names: NameFinder) -> Iterator[StoredTensor]:
    """The model's tensors, which `find_names` tells, of a folder that `torch.distributed.checkpoint.save` wrote.

    Raises:
        CheckpointError: a file is missing, cut off or of another form, the chunks of a tensor leave a gap or
            overlap, or the metadata holds more than metadata.
    """
    described, places, paths = _read_metadata(folder / METADATA)
    names = find_names(paths, folder)
    chunks: list[_Chunk] = []
    for key, name in names.items():
        check_boxes(name, described[key].shape, described[key].boxes, folder)
        chunks += _chunks(key, described[key], places, folder)
    parts: dict[str, list[StoredPart]] = {key: [] for key in names}
    for chunk, part in _find_parts(chunks):
        parts[chunk.key].append(part)
    for key, name in names.items():
        own = tuple(sorted(parts[key], key=lambda part: part.corner))
        yield StoredTensor(name, described[key].dtype, described[key].shape, own)


_Places = Mapping[tuple[str, _Corner], Record]
_Paths = dict[str, tuple[str | int, ...]]


def _read_metadata(file: Path) -> tuple[dict[str, _Described], _Places, _Paths]:
    """The tensors by key, where each of their chunks is, and the dicts that each key stood in when it was saved."""
    try:
        metadata = DataUnpickler(file.read_bytes(), _NAMES, file).load()
        described = {
            key: _describe(entry)
            for key, entry in metadata["state_dict_metadata"].items()
            if isinstance(entry, _TensorRecord)
        }
        if not all(isinstance(key, str) for key in described):
            raise TypeError("a name that is no text")
        places = {
            (index["fqn"], tuple(index["offset"])): place
            for index, place in metadata["storage_data"].items()
            if index.get("offset") is not None
        }
        own_paths = metadata.get("planner_data") or {}
        paths = {key: tuple(own_paths.get(key, (key,))) for key in described}
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{file} is no metadata of torch.distributed.checkpoint: {error!r}") from None
    return described, places, paths


def _describe(entry: Record) -> _Described:
    dtype = entry["properties"].state[0]
    shape = tuple(entry["size"])
    boxes = [(tuple(chunk["offsets"]), tuple(chunk["sizes"])) for chunk in entry["chunks"]]
    numbers = [*shape, *(number for box in boxes for side in box for number in side)]
    if not isinstance(dtype, torch.dtype) or any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"a tensor of {dtype} with shape {shape}")
    # Ranks that had nothing of a tensor wrote chunks too, all at its end.
    held = [box for box in dict.fromkeys(boxes) if 0 not in box[1]] or boxes[:1]
    return _Described(dtype, shape, tuple(held))


def _chunks(key: str, tensor: _Described, places: _Places, folder: Path) -> Iterator[_Chunk]:
    for corner, shape in tensor.boxes:
        place = places.get((key, corner))
        if place is None:
            raise CheckpointError(f"{folder / METADATA} does not say where {key!r} from {list(corner)} on is stored")
        try:
            name, start, length = place["relative_path"], place["offset"], place["length"]
            if not isinstance(name, str) or any(type(number) is not int or number < 0 for number in (start, length)):
                raise TypeError
        except (TypeError, KeyError):
            raise CheckpointError(f"{folder / METADATA} has no readable place for {key!r}") from None
        if Path(name).name != name:
            raise CheckpointError(f"{folder / METADATA} names {name!r}, which is not a file of its own folder")
        if place.get("transform_descriptors"):
            raise CheckpointError(
                f"{key!r} in {folder / name} was written through {place['transform_descriptors']}: "
                "save it without extensions"
            )
        yield _Chunk(key, tensor.dtype, corner, shape, folder / name, start, length)


def _find_parts(chunks: list[_Chunk]) -> Iterator[tuple[_Chunk, StoredPart]]:
    """The chunks with the bytes that their elements lie at, file by file."""
    by_file: dict[Path, list[_Chunk]] = {}
    for chunk in chunks:
        by_file.setdefault(chunk.file, []).append(chunk)
    for file, own in sorted(by_file.items()):
        try:
            with file.open("rb") as stream:
                size = file.stat().st_size
                for chunk in sorted(own, key=lambda chunk: chunk.start):
                    if chunk.start + chunk.length > size:
                        missing = chunk.start + chunk.length - size
                        raise CheckpointError(
                            f"{file} is cut off: {size} bytes, at least {missing} more are needed for {chunk.key!r}"
                        )
                    content = read_torch_archive(stream, file, chunk.start, chunk.length)
                    yield chunk, _part_of(chunk, content)
        except FileNotFoundError:
            raise CheckpointError(f"{file.parent / METADATA} names {file.name!r}, which is missing") from None


def _part_of(chunk: _Chunk, content: Any) -> StoredPart:
    if not isinstance(content, PickledTensor):
        raise CheckpointError(f"{chunk.file} holds no tensor at byte {chunk.start}, where {chunk.key!r} should be")
    if (content.dtype, content.shape) != (chunk.dtype, chunk.shape):
        raise CheckpointError(
            f"{chunk.key!r} from {list(chunk.corner)} on has shape {list(content.shape)} of {content.dtype} in "
            f"{chunk.file}, but {list(chunk.shape)} of {chunk.dtype} in {METADATA}"
        )
    tensor = check_layout(content, chunk.key, chunk.file)
    num_bytes = torch.Size(chunk.shape).numel() * chunk.dtype.itemsize
    return StoredPart(chunk.file, chunk.corner, chunk.shape, tensor.offset, num_bytes)
