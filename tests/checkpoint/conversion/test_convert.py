"""What is converted is what the source holds, in little memory, and a run that was cut off is gone on with."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from families import FAMILIES, save_random_model
from places import RANKS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_loader import load
from transformers import AutoModelForCausalLM

from ts_parallel.checkpoint.conversion import convert as convert_module
from ts_parallel.checkpoint.conversion import pieces
from ts_parallel.checkpoint.conversion.convert import check_index, compare_contents, convert
from ts_parallel.checkpoint.conversion.journal import JOURNAL, only_writer
from ts_parallel.checkpoint.conversion.pieces import Format, Piece
from ts_parallel.checkpoint.conversion.write_safetensors import Safetensors
from ts_parallel.checkpoint.index import SHARD_INDEX, SINGLE_FILE, TORCH_FILE, read_index
from ts_parallel.checkpoint.stored import stored_whole
from ts_parallel.cli.write_dcp import DistributedCheckpoint
from ts_parallel.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

GENERATOR = torch.Generator().manual_seed(0)
TENSORS = {
    "wide": torch.randn(10, 6, generator=GENERATOR),
    "few_rows": torch.randn(2, 3, generator=GENERATOR).bfloat16(),
    "long": torch.randint(-9, 9, (1000,), generator=GENERATOR, dtype=torch.int8),
    "odd": torch.randn(7, 3, 2, generator=GENERATOR).half(),
    "float8": torch.randn(5, 4, generator=GENERATOR).to(torch.float8_e4m3fn),
    "mask": torch.tensor([True, False, True]),
    "scalar": torch.tensor(7),
    "empty": torch.empty(0, 5),
    "empty_rows": torch.empty(3, 0),
    "not_a_number": torch.tensor([float("nan"), -0.0]),
}
FORMATS: dict[str, Format] = {"safetensors": Safetensors(200), "dcp": DistributedCheckpoint(3)}


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small tensors have several, and a record is made after some of them."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 100)
    monkeypatch.setattr(convert_module, "_BYTES_BETWEEN_RECORDS", 250)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    save_file(TENSORS, folder / SINGLE_FILE)
    (folder / "config.json").write_text("{}")
    return folder


def is_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """In dtype, shape and every bit."""
    same = (one.dtype, one.shape) == (other.dtype, other.shape)
    return same and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def assert_equal(tensors: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == TENSORS.keys()
    assert [name for name in TENSORS if not is_equal(tensors[name], TENSORS[name])] == []


def loaded_by_torch(folder: Path) -> dict[str, torch.Tensor]:
    state = {name: torch.full_like(tensor, 1) for name, tensor in TENSORS.items()}
    load(state, checkpoint_id=folder, no_dist=True)
    return state


def loaded_by_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    files = folder.glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_dcp_is_loaded_by_torch_bit_by_bit(num_ranks: int, source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "dcp", DistributedCheckpoint(num_ranks), compare=True)
    ranks = [f"__{rank}_0.distcp" for rank in range(num_ranks)]
    assert files_of(tmp_path / "dcp") == [".metadata", *ranks, "config.json"]
    assert_equal(loaded_by_torch(tmp_path / "dcp"))


def test_older_torch_file_becomes_safetensors(source: Path, tmp_path: Path) -> None:
    (source / SINGLE_FILE).unlink()
    torch.save(TENSORS, source / TORCH_FILE)
    convert(source, tmp_path / "new", Safetensors())
    assert files_of(tmp_path / "new") == ["config.json", SINGLE_FILE]
    assert_equal(load_file(tmp_path / "new" / SINGLE_FILE))


def test_dcp_becomes_one_file_with_torch_s_own_tool(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "dcp", DistributedCheckpoint(2))
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "model.pt")
    assert_equal(torch.load(tmp_path / "model.pt"))


def test_each_rank_s_file_holds_the_rows_that_torch_s_shard_gives_it(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "dcp", DistributedCheckpoint(3))
    metadata = FileSystemReader(tmp_path / "dcp").read_metadata()
    rows: dict[tuple[str, str], int] = {}
    for place, info in metadata.storage_data.items():
        chunk = metadata.state_dict_metadata[place.fqn].chunks[place.index]
        assert place.offset == chunk.offsets
        if chunk.sizes:
            key = (place.fqn, info.relative_path)
            rows[key] = rows.get(key, 0) + chunk.sizes[0]
    for name in ("wide", "few_rows", "long", "odd", "float8"):
        expected = [len(chunk) for chunk in torch.arange(TENSORS[name].shape[0]).chunk(3)]
        found = [rows[name, f"__{rank}_0.distcp"] for rank in range(3) if (name, f"__{rank}_0.distcp") in rows]
        assert found == expected, name


def test_dcp_becomes_safetensors_again(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "dcp", DistributedCheckpoint(3))
    convert(tmp_path / "dcp", tmp_path / "back", Safetensors(), compare=True)
    assert files_of(tmp_path / "back") == ["config.json", SINGLE_FILE]
    assert_equal(load_file(tmp_path / "back" / SINGLE_FILE))
    with safe_open(tmp_path / "back" / SINGLE_FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_are_named_as_transformers_does_and_keep_to_their_size(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "shards", Safetensors(200))
    index = json.loads((tmp_path / "shards" / SHARD_INDEX).read_text())
    weight_map = index["weight_map"]
    names = sorted(set(weight_map.values()))
    assert names == [f"model-{number:05d}-of-{len(names):05d}.safetensors" for number in range(1, len(names) + 1)]
    assert files_of(tmp_path / "shards") == ["config.json", *names, SHARD_INDEX]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    for name in names:
        tensors = load_file(tmp_path / "shards" / name)
        assert {weight_map[tensor] for tensor in tensors} == {name}
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 200 or len(tensors) == 1
    assert_equal(loaded_by_safetensors(tmp_path / "shards"))


def test_model_converted_there_and_back_is_the_same_to_transformers(tmp_path: Path) -> None:
    save_random_model(tmp_path / "model", FAMILIES["llama"](num_hidden_layers=1, vocab_size=97))
    pieces.PIECE_BYTES = 10_000
    convert(tmp_path / "model", tmp_path / "dcp", DistributedCheckpoint(2))
    convert(tmp_path / "dcp", tmp_path / "shards", Safetensors(20_000))
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("model", "shards")]
    assert models[0].keys() == models[1].keys()
    assert all(is_equal(models[0][name], models[1][name]) for name in models[0])
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1


def test_everything_but_weights_is_copied(source: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja", "1_Pooling/config.json"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    for name in ("optimizer.pt", ".gitattributes", "x.safetensors.index.json", "onnx/model.onnx", "onnx/config.json"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    convert(source, source / "inside", DistributedCheckpoint())
    convert(source, tmp_path / "beside", Safetensors())
    copied = ["1_Pooling", "chat_template.jinja", "config.json"]
    assert files_of(source / "inside") == [".metadata", *copied[:1], "__0_0.distcp", *copied[1:], "tokenizer.json"]
    assert files_of(tmp_path / "beside") == [*copied, SINGLE_FILE, "tokenizer.json"]
    assert (tmp_path / "beside" / "1_Pooling" / "config.json").read_text() == "1_Pooling/config.json"


def test_configuration_is_taken_from_where_it_is(source: Path, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text('{"its": "own"}')
    convert(source, tmp_path / "new", Safetensors(), tmp_path / "config")
    assert (tmp_path / "new" / "config.json").read_text() == '{"its": "own"}'


def test_configuration_that_a_trainer_left_above_is_taken_without_what_else_is_there(
    source: Path, tmp_path: Path
) -> None:
    convert(source, tmp_path / "run" / "step-1", DistributedCheckpoint())
    (tmp_path / "run" / "step-1" / "config.json").rename(tmp_path / "run" / "config.json")
    (tmp_path / "run" / "logs").mkdir()
    (tmp_path / "run" / "logs" / "events.txt").touch()
    convert(tmp_path / "run" / "step-1", tmp_path / "run" / "new", Safetensors())
    assert files_of(tmp_path / "run" / "new") == ["config.json", SINGLE_FILE]


class Crash(BaseException):
    """The machine goes down: nothing in the program sees it coming."""


@contextmanager
def counted_reads(crash_at: int | None = None) -> Iterator[list[str]]:
    """The names of the tensors whose pieces are read, the read of number `crash_at` being the last."""
    names: list[str] = []
    read = Piece.read

    def counting(piece: Piece) -> torch.Tensor:
        if len(names) == crash_at:
            raise Crash
        names.append(piece.source.name)
        return read(piece)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Piece, "read", counting)
        yield names


@pytest.mark.parametrize("name", FORMATS)
def test_run_that_was_cut_off_is_gone_on_with(name: str, source: Path, tmp_path: Path) -> None:
    with counted_reads() as all_reads:
        convert(source, tmp_path / "whole", FORMATS[name])
    for crash_at in range(1, len(all_reads), 5):
        destination = tmp_path / f"crash-{crash_at}"
        with counted_reads(crash_at), pytest.raises(Crash):
            convert(source, destination, FORMATS[name])
        for file in destination.glob("*_0.distcp" if name == "dcp" else "*.safetensors"):
            assert file.stat().st_size == (tmp_path / "whole" / file.name).stat().st_size
        with pytest.raises(CheckpointError):
            read_index(destination)  # nobody takes it for a checkpoint
        with counted_reads() as reads:
            convert(source, destination, FORMATS[name])
        assert reads == all_reads[len(all_reads) - len(reads) :]
        # What was not recorded yet: less than 250 bytes, that is of DCP one piece with its 1.5 kB around it.
        assert len(all_reads) - crash_at <= len(reads) <= len(all_reads) - crash_at + (1 if name == "dcp" else 7)
        assert files_of(destination) == files_of(tmp_path / "whole")
        assert_equal((loaded_by_torch if name == "dcp" else loaded_by_safetensors)(destination))


def test_process_that_was_killed_is_gone_on_with(source: Path, tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from ts_parallel.checkpoint.conversion import convert, pieces
pieces.PIECE_BYTES = 100
convert._BYTES_BETWEEN_RECORDS = 250
read, left = pieces.Piece.read, list(range(12))
def killed(piece):
    left.pop() if left else os.kill(os.getpid(), signal.SIGKILL)
    return read(piece)
pieces.Piece.read = killed
from ts_parallel.checkpoint.conversion.write_safetensors import Safetensors
convert.convert(Path({str(source)!r}), Path({str(tmp_path / "new")!r}), Safetensors())
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == -9
    assert files_of(tmp_path / "new") == [JOURNAL, "config.json", f"{SINGLE_FILE}.part"]
    with counted_reads() as reads:
        convert(source, tmp_path / "new", Safetensors())
    with counted_reads() as all_reads:
        convert(source, tmp_path / "whole", Safetensors())
    assert 0 < len(reads) < len(all_reads) - 5
    assert_equal(load_file(tmp_path / "new" / SINGLE_FILE))


def test_file_that_is_not_as_it_was_recorded_is_written_again(source: Path, tmp_path: Path) -> None:
    with counted_reads() as all_reads:
        convert(source, tmp_path / "whole", FORMATS["dcp"])
    with counted_reads(len(all_reads) - 1), pytest.raises(Crash):
        convert(source, tmp_path / "new", FORMATS["dcp"])
    for file in ("__0_0.distcp", "__2_0.distcp.part"):
        os.truncate(tmp_path / "new" / file, 1000)
    with counted_reads() as reads:
        convert(source, tmp_path / "new", FORMATS["dcp"])
    files = FORMATS["dcp"].plan(read_index(source))
    assert len(reads) == len(files[0].pieces) + len(files[2].pieces)
    assert_equal(loaded_by_torch(tmp_path / "new"))


def test_part_of_another_conversion_is_refused(source: Path, tmp_path: Path) -> None:
    with counted_reads(12), pytest.raises(Crash):
        convert(source, tmp_path / "new", DistributedCheckpoint(2))
    with pytest.raises(CheckpointError, match="another conversion, whose ranks was 2, not 3: remove it"):
        convert(source, tmp_path / "new", DistributedCheckpoint(3))
    with pytest.raises(CheckpointError, match='another conversion, whose to was "dcp", not "safetensors"'):
        convert(source, tmp_path / "new", Safetensors())
    os.utime(source / SINGLE_FILE, ns=(0, 0))
    with pytest.raises(CheckpointError, match="another conversion, whose files was"):
        convert(source, tmp_path / "new", DistributedCheckpoint(2))
    (tmp_path / "new" / JOURNAL).write_text("{")
    with pytest.raises(CheckpointError, match=r"\.convert\.json is damaged: remove .*new and convert again"):
        convert(source, tmp_path / "new", DistributedCheckpoint(2))


def test_destination_that_holds_something_is_refused(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "new", Safetensors())
    before = files_of(tmp_path / "new")
    with pytest.raises(CheckpointError, match="new exists and is not empty: remove it or name another folder"):
        convert(source, tmp_path / "new", Safetensors())
    with pytest.raises(CheckpointError, match="source exists and is not empty"):
        convert(source, source, DistributedCheckpoint())
    with pytest.raises(CheckpointError, match=r"config\.json is no folder"):
        convert(source, source / "config.json", Safetensors())
    assert files_of(tmp_path / "new") == before


def test_two_at_once_into_the_same_folder_are_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    with only_writer(tmp_path / "new"), pytest.raises(CheckpointError, match=r"another process is writing .*new: wait"):
        convert(source, tmp_path / "new", Safetensors())
    convert(source, tmp_path / "new", Safetensors())


@pytest.mark.parametrize("name", FORMATS)
def test_disk_that_is_full_is_one_clear_error_and_can_be_gone_on_with(name: str, source: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    form = DistributedCheckpoint() if name == "dcp" else Safetensors()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # writes beyond end as those to a full disk do
        with pytest.raises(CheckpointError) as refusal:
            convert(source, tmp_path / "new", form)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(refusal.value)
    assert "\n" not in message and f"cannot write {tmp_path / 'new'}: File too large" in message
    assert "bytes are still to be written and" in message and "run the same again" in message
    assert not [path for path in files_of(tmp_path / "new") if path.endswith((".safetensors", ".distcp", ".metadata"))]
    convert(source, tmp_path / "new", form)
    assert_equal((loaded_by_torch if name == "dcp" else loaded_by_safetensors)(tmp_path / "new"))


def test_other_error_of_the_file_system_names_the_file(source: Path, tmp_path: Path) -> None:
    with counted_reads(1), pytest.raises(Crash):
        convert(source, tmp_path / "new", Safetensors())
    (tmp_path / "new" / f"{SINGLE_FILE}.part").unlink()
    (tmp_path / "new" / f"{SINGLE_FILE}.part").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot convert to .*new: .*model\.safetensors\.part: Is a directory"):
        convert(source, tmp_path / "new", Safetensors())


def test_too_little_room_is_found_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1234))
    with pytest.raises(CheckpointError, match=r"[\d,]+ bytes are to be written to .*new and 1,234 are free: make room"):
        convert(source, tmp_path / "not" / "there" / "new", Safetensors())
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize("name", FORMATS)
def test_comparison_names_the_tensor_that_differs(name: str, source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "new", FORMATS[name])
    index, written = read_index(source), read_index(tmp_path / "new")
    compare_contents(index, written, tmp_path / "new")
    part = next(part for part in written["odd"].parts if part.corner[0] + part.shape[0] == 7)
    with part.file.open("r+b") as file:
        file.seek(part.offset + part.num_bytes - 1)  # of the last row
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([last ^ 1]))
    with pytest.raises(CheckpointError, match=r"'odd' in .*new differs from the source in rows 0 to 6: remove it"):
        compare_contents(index, written, tmp_path / "new")


def test_name_shape_and_dtype_are_checked(source: Path, tmp_path: Path) -> None:
    index = dict(read_index(source))
    without = {name: tensor for name, tensor in index.items() if name != "wide"}
    changed = {**index, "wide": stored_whole("wide", source / SINGLE_FILE, torch.float32, (6, 10), 0)}
    with pytest.raises(CheckpointError, match=r"'wide' is torch.float32 \[10, 6\] in the source but missing in"):
        check_index(index, without, tmp_path)
    with pytest.raises(CheckpointError, match="'wide' is missing in the source but"):
        check_index(without, index, tmp_path)
    with pytest.raises(CheckpointError, match=r"\[10, 6\] in the source but torch.float32 \[6, 10\] in"):
        check_index(index, changed, tmp_path)


def test_dtype_that_safetensors_cannot_hold_is_refused(tmp_path: Path) -> None:
    stored = stored_whole("x", tmp_path, torch.complex64, (2,), 0)
    with pytest.raises(CheckpointError, match=r"'x' is torch.complex64, safetensors files hold .*: convert to dcp"):
        Safetensors().plan({"x": stored})


def test_folder_without_tensors_is_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / SINGLE_FILE)
    with pytest.raises(CheckpointError, match="no tensors in"):
        convert(tmp_path, tmp_path / "new", Safetensors())


def test_memory_is_that_of_a_piece_however_large_the_tensor(tmp_path: Path) -> None:
    num_bytes = 320_000_000
    header = {"x": {"dtype": "U8", "shape": [80_000, 4000], "data_offsets": [0, num_bytes]}}
    text = json.dumps(header).encode()
    with (tmp_path / SINGLE_FILE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + num_bytes)  # a hole, which reads as zeros
    program = f"""
import sys
from pathlib import Path
sys.path.append({str(RANKS)!r})
from peak_memory import peak_mb
from ts_parallel.checkpoint.conversion.convert import convert
from ts_parallel.checkpoint.conversion.write_safetensors import Safetensors
from ts_parallel.cli.write_dcp import DistributedCheckpoint
folder, start = Path({str(tmp_path)!r}), peak_mb()
convert(folder, folder / "dcp", DistributedCheckpoint(2))
convert(folder / "dcp", folder / "safetensors", Safetensors(), compare=True)
print(peak_mb() - start)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert 64 < float(result.stdout) < 250, result.stdout  # the piece of 64 MiB, and what torch.save makes of it
