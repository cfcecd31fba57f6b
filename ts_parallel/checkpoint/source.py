"""Where a checkpoint is: a folder, or a repository of the hub that is fetched once."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ts_parallel.checkpoint.folders.located import checkpoint_folder
from ts_parallel.checkpoint.gguf.prepared import is_gguf
from ts_parallel.errors import CheckpointError

# No code: nothing that is fetched can run.
_FETCHED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# Only where there is nothing else. They are pickles, of which `torch_files.py` reads the tensors and executes nothing.
_TORCH_FILES = ["pytorch_model.bin", "pytorch_model-*.bin", "adapter_model.bin"]


def locate_checkpoint(path_or_hub_id: str) -> Path:
    """The local folder of a checkpoint, absolute.

    Raises:
        CheckpointError: it is no folder and no GGUF file here, and no repository that the hub can be asked for; or the
            folder holds several checkpoints, or none that is read here.
    """
    return checkpoint_folder(locate_folder(path_or_hub_id))


def locate_folder(path_or_hub_id: str) -> Path:
    """The local folder that is meant, an adapter's for example, or GGUF file, absolute.

    Raises:
        CheckpointError: it is none here, and no repository that the hub can be asked for.
    """
    try:
        folder = Path(path_or_hub_id).expanduser()
        if folder.is_dir() or is_gguf(folder):
            return folder.resolve()
    except (RuntimeError, OSError):  # no such user, a name too long
        raise CheckpointError(f"no folder {path_or_hub_id}") from None
    try:
        fetched = Path(snapshot_download(path_or_hub_id, allow_patterns=_FETCHED))
        if any(fetched.glob("*.safetensors")):
            return fetched
        return Path(snapshot_download(path_or_hub_id, allow_patterns=[*_FETCHED, *_TORCH_FILES]))
    except HFValidationError:
        raise CheckpointError(f"no folder {path_or_hub_id}") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path_or_hub_id} is no folder, and the hub gave no such model: {reason}") from None
