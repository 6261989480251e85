"""From what the user named to a local folder: a folder, a hub id, or a GGUF file converted once."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Final

from .errors import CheckpointError

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
# What a repository may hold beside the safetensors weights and we have no use for.
_NOT_FETCHED: Final = (
    *("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.tflite", "*.gguf", "*.ckpt"),
    *("original/*", "onnx/*", "openvino/*", "coreml/*"),
)


def locate(model: str, *, revision: str | None) -> Path:
    """The local folder that holds `model`, fetched or converted first where that is needed."""
    check_named(model, revision=revision)
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        from .gguf import converted

        return converted(path)
    return _fetch(model, revision=revision)


def check_named(model: str, *, revision: str | None) -> None:
    """Raise CheckpointError if `model` is neither a folder, nor a GGUF file, nor might be a hub id.

    This imports nothing large, so that a slip is told at once.
    """
    path = Path(model).expanduser()
    is_local = path.is_dir() or path.is_file()
    if is_local and revision is not None:
        raise CheckpointError(f"The revision {revision} was asked for, but {model} is local; leave the revision out.")
    if path.is_file() and path.suffix.lower() != ".gguf":
        raise CheckpointError(f"{model} is a file; name the folder that holds the model, a hub id or a .gguf file.")
    if not is_local and not _looks_like_hub_id(model):
        there = _suggestion(path)
        raise CheckpointError(f"There is no model at {model}{there}; name a folder, a hub id or a .gguf file.")


def _looks_like_hub_id(model: str) -> bool:
    if _HUB_ID.fullmatch(model) is None or model.lower().endswith(".gguf"):
        return False
    return "/" not in model or not Path(model).parent.exists()


def _suggestion(path: Path) -> str:
    try:
        siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir() or entry.suffix == ".gguf"]
    except OSError:
        return f" (the folder {path.parent} isn't there either)"
    nearest = difflib.get_close_matches(path.name, siblings, n=1)
    return f" (did you mean {path.parent / nearest[0]}?)" if nearest else ""


def _fetch(model: str, *, revision: str | None) -> Path:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    hint = _suggestion(Path(model))
    try:
        return Path(snapshot_download(model, revision=revision, ignore_patterns=list(_NOT_FETCHED)))
    except hub.GatedRepoError as error:
        raise CheckpointError(
            f"The hub's model {model} is gated; accept its terms on its page and log in with `hf auth login`."
        ) from error
    except hub.RevisionNotFoundError as error:
        raise CheckpointError(f"The hub's model {model} has no revision {revision}.") from error
    except (hub.RepositoryNotFoundError, hub.HFValidationError) as error:
        raise CheckpointError(
            f"There is no folder {model}{hint}, and the hub has no model of that name that you may read."
        ) from error
    except (OSError, hub.HTTPError) as error:  # type: ignore[attr-defined]  # of whichever httpx it uses
        at = f" at revision {revision}" if revision else ""
        raise CheckpointError(
            f"There is no folder {model}{hint}, the hub can't be reached ({type(error).__name__}), "
            f"and no complete copy of {model}{at} is in the local hub cache."
        ) from error
