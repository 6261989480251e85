"""The place that a checkpoint is written to: what may be there, what is left of a killed run, and the lock on it."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import Final

from .errors import OutputError
from .index import CONFIG, Checkpoint
from .journal import NAME as JOURNAL
from .shards import disk_errors, sync_folder

WORKSPACE: Final = ".work"


def partial_of(target: Path) -> Path:
    """The hidden folder in which a run for `target` works. What it puts there is swept away by the next run."""
    return sibling(Path(os.path.abspath(target)), "partial")


def workspace_of(target: Path) -> Path:
    """The folder in the hidden one for what a resumed run finds again: it is there until the output is finished."""
    return partial_of(target) / WORKSPACE


def has_work(partial: Path) -> bool:
    """Whether a run left something in its workspace."""
    folder = partial / WORKSPACE
    return folder.is_dir() and any(folder.iterdir())


def check_target(target: Path, *, overwrite: bool, resume: bool = False, has_partial: bool = False) -> None:
    """Raise OutputError if `target` holds something that may not be replaced."""
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(f"The output {target} is a file; name a folder.")
    if not any(target.iterdir()):
        return
    if not overwrite and resume and not has_partial:
        raise OutputError(f"The output {target} is already finished; there is nothing to resume.")
    if not overwrite:
        also = " together with --resume" if resume else ""
        raise OutputError(f"The output {target} exists already; give --overwrite{also} to replace it, or name another.")
    if not (target / CONFIG).is_file():
        raise OutputError(f"The output {target} has files in it but is no model, so it isn't replaced; name another.")


def check_apart(target: Path, source: Checkpoint) -> None:
    """Raise OutputError if the output lies in the model's folder, or the other way round."""
    inside, outside = target.resolve(), source.folder.resolve()
    if inside == outside or outside in inside.parents or inside in outside.parents:
        raise OutputError(f"The output {target} and the model {source.folder} overlap; name another output folder.")


def make_parent(target: Path) -> None:
    """Make the folder that `target` is to lie in. Raises OutputError if nothing may be written there."""
    with disk_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OutputError(f"Can't write in {target.parent}: permission denied; name another output folder.")


def publish(folder: Path, target: Path) -> None:
    """Rename the finished `folder` beside `target` to it. What was there is removed when the new one is in place."""
    old = sibling(target, "old")
    with disk_errors(target.parent):
        replaces = target.exists() and any(target.iterdir())
        if replaces:
            target.rename(old)
        try:
            folder.rename(target)
        except OSError:
            if replaces:
                old.rename(target)
            raise
        sync_folder(target.parent)
        (target / JOURNAL).unlink(missing_ok=True)
        if replaces:
            shutil.rmtree(old, ignore_errors=True)
        sync_folder(target)


def undo_half_replacement(target: Path) -> None:
    """A run that was killed while it replaced `target`: put the old one back, or clean up behind the new one."""
    old = sibling(target, "old")
    with disk_errors(target.parent):
        if old.is_dir() and not target.exists():
            old.rename(target)
        elif old.is_dir():
            shutil.rmtree(old, ignore_errors=True)
        if target.is_dir():
            (target / JOURNAL).unlink(missing_ok=True)


def clean_up(target: Path) -> None:
    """Remove what a run that was killed right after its last rename left in and beside the finished `target`."""
    undo_half_replacement(Path(os.path.abspath(target.expanduser())))


def lock(partial: Path, target: Path) -> int:
    """An exclusive lock on the folder itself, which moves with it and ends with the process."""
    with disk_errors(target.parent):
        partial.mkdir(exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not partial.exists() or os.fstat(descriptor).st_ino != partial.stat().st_ino:
            raise BlockingIOError
    except BlockingIOError as error:
        os.close(descriptor)
        raise OutputError(f"Another run is writing {target} right now; wait for it or name another output.") from error
    return descriptor


def sibling(target: Path, suffix: str) -> Path:
    """The hidden folder NAME.suffix beside `target`."""
    return target.with_name(f".{target.name}.{suffix}")
