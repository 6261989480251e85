"""A checkpoint written so that at any moment there is either nothing, something to resume, or all of it.

The work is done in a hidden folder beside the target, `.NAME.partial`: a shard for each part with a line in the
journal once the shard is on disk, then everything else, then one rename to the target. A run that was killed goes on
after the last part, and since every byte depends on the tensors alone, ends in the same files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from torch import Tensor

from .errors import OutputError
from .headers import TensorInfo, read_header
from .index import CONFIG, INDEX, SINGLE, Checkpoint, read_tensors
from .journal import Journal, Part
from .shards import Entry, copy_file, disk_errors, natural_key, sync_folder, write_file, write_shard
from .target import (
    WORKSPACE,
    check_apart,
    check_target,
    has_work,
    lock,
    make_parent,
    partial_of,
    publish,
    undo_half_replacement,
)

SHARD_LIMIT: Final = 1 << 30  # bytes in a shard of copied tensors


class CheckpointWriter:
    """Use as a context manager: leaving it frees the lock, and keeps what was written for a run with resume."""

    def __init__(self, target: Path, source: Checkpoint, *, journal: Journal, lock: int) -> None:
        self._target, self._source, self._journal, self._lock = target, source, journal, lock
        self._folder = journal.folder
        self._dropped: dict[str, str] = {}

    @classmethod
    def open(
        cls, target: Path, *, source: Checkpoint, fingerprint: str, overwrite: bool = False, resume: bool = False
    ) -> CheckpointWriter:
        """`fingerprint` stands for everything that the bytes depend on: recipe, source, versions."""
        target = Path(os.path.abspath(target.expanduser()))
        partial = partial_of(target)
        check_apart(target, source)
        make_parent(target)
        is_new = not partial.exists()
        held = lock(partial, target)
        with ExitStack() as undo:
            undo.callback(os.close, held)
            if is_new:
                undo.callback(shutil.rmtree, partial)
            undo_half_replacement(target)
            check_target(target, overwrite=overwrite, resume=resume, has_partial=not is_new)
            journal = _start(partial, target, fingerprint=fingerprint, overwrite=overwrite, resume=resume)
            undo.pop_all()
        return cls(target, source, journal=journal, lock=held)

    @property
    def done(self) -> Mapping[str, dict[str, Any]]:
        """The parts that are on disk, with the record that was journalled with each."""
        return {name: part.record for name, part in self._journal.parts.items()}

    @property
    def folder(self) -> Path:
        """The hidden folder of the run."""
        return self._folder

    @property
    def dropped(self) -> Mapping[str, str]:
        return dict(self._dropped)

    def write_part(
        self, part: str, tensors: Mapping[str, Tensor], *, replaces: Iterable[str], record: dict[str, Any]
    ) -> None:
        """Put a shard on disk for good. `replaces`: the source's tensors that these take the place of."""
        if part in self._journal.parts:
            raise ValueError(f"part {part} is written already")
        file = f"part-{hashlib.sha256(part.encode()).hexdigest()[:16]}.safetensors"
        entries = [Entry.of_tensor(name, tensor) for name, tensor in tensors.items()]
        size, sha256 = write_shard(self._folder / file, entries)
        self._journal.add(Part(part, file, size, sha256, tuple(replaces), tuple(sorted(tensors)), record))

    def read_part(self, part: str) -> dict[str, Tensor]:
        return read_tensors(read_header(self._folder / self._journal.parts[part].file).values())

    def drop(self, names: Iterable[str], reason: str) -> None:
        """Leave these source tensors out on purpose."""
        self._dropped.update(dict.fromkeys(names, reason))

    def finish(self, *, config: dict[str, Any], files: Mapping[str, bytes], left_out: Iterable[str] = ()) -> Path:
        """Copy what is left of the source, check that nothing is lost or doubled, and rename to the target.

        `config` becomes config.json; `files` are written beside it (a path with slashes makes folders) and win over
        the source's side files of the same name. `left_out`: the source's side files that the result has no use for.
        """
        left_out = frozenset(left_out)
        copied = self._account()
        shards = [part.file for part in sorted(self._journal.parts.values(), key=lambda part: natural_key(part.part))]
        shards += self._copy(copied)
        weight_map = self._check_written(shards, copied)
        renamed = _final_names(shards)
        for path in self._source.side_files:
            if str(path) not in files and str(path) not in left_out:
                copy_file(self._source.folder / path, self._folder / path)
        for name, data in {**files, CONFIG: _json(config)}.items():
            with disk_errors(self._folder):
                (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(self._folder / name, data)
        if len(shards) > 1:
            total = sum(info.nbytes for info in weight_map.values())
            index = {name: renamed[info.file.name] for name, info in weight_map.items()}
            write_file(self._folder / INDEX, _json({"metadata": {"total_size": total}, "weight_map": index}))
        self._journal.finishing(renamed)
        with disk_errors(self._folder):
            if (self._folder / WORKSPACE).is_dir():
                shutil.rmtree(self._folder / WORKSPACE)
            for old, new in renamed.items():
                (self._folder / old).rename(self._folder / new)
            for folder in (*(path for path in self._folder.rglob("*") if path.is_dir()), self._folder):
                sync_folder(folder)
        publish(self._folder, self._target)
        return self._target

    def close(self) -> None:
        """Free the lock. Parts and a workspace stay for a run with resume; a folder without either is removed."""
        if self._lock < 0:
            return
        if not self._journal.parts and self._folder.exists() and not has_work(self._folder):
            shutil.rmtree(self._folder)
        os.close(self._lock)
        self._lock = -1

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _account(self) -> list[TensorInfo]:
        """The source's tensors to be copied; every other one is replaced once, or dropped, and none both."""
        known = self._source.tensors
        owners: dict[str, str] = dict.fromkeys(self._dropped, "what was dropped")
        written: dict[str, str] = {}
        for part in self._journal.parts.values():
            for name in part.replaces:
                if name in owners:
                    raise OutputError(f"{name} is replaced by {part.part} and by {owners[name]}; nothing was written.")
                owners[name] = part.part
            for name in part.tensors:
                if name in written:
                    raise OutputError(f"{name} is written by {part.part} and by {written[name]}; nothing was written.")
                written[name] = part.part
        strange = sorted(owners.keys() - known.keys())
        if strange:
            raise OutputError(f"{owners[strange[0]]} stands for {strange[0]}, which {self._source.source} hasn't got.")
        for name, part_name in written.items():
            module_weight = f"{name.rpartition('.')[0]}.weight"
            if name in known and name not in owners:
                raise OutputError(f"{name} would be written twice, by {part_name} and as a copy of the source's.")
            if name not in known and module_weight in known and module_weight not in owners:
                raise OutputError(f"{name} of {part_name} and {module_weight} would both be there, one to no use.")
        return [known[name] for name in sorted(known, key=natural_key) if name not in owners]

    def _copy(self, tensors: list[TensorInfo]) -> list[str]:
        groups: list[list[TensorInfo]] = []
        filled = SHARD_LIMIT
        for info in tensors:
            if filled + info.nbytes > SHARD_LIMIT:
                groups.append([])
                filled = 0
            groups[-1].append(info)
            filled += info.nbytes
        names = [f"copy-{number:05d}.safetensors" for number in range(1, len(groups) + 1)]
        for name, group in zip(names, groups, strict=True):
            write_shard(self._folder / name, map(Entry.of_file, group))
        return names

    def _check_written(self, shards: list[str], copied: list[TensorInfo]) -> dict[str, TensorInfo]:
        """Read the headers back: each tensor once, the copied ones with the source's shape and dtype."""
        found: dict[str, TensorInfo] = {}
        for shard in shards:
            found.update(read_header(self._folder / shard))
        written = {name for part in self._journal.parts.values() for name in part.tensors}
        if found.keys() != written | {info.name for info in copied}:
            raise OutputError(f"The shards in {self._folder} don't hold what was written into them; run it again.")
        for info in copied:
            if (info.dtype, info.shape) != (found[info.name].dtype, found[info.name].shape):
                raise OutputError(f"The copy of {info.name} in {self._folder} isn't like the source's; run it again.")
        return {name: found[name] for name in sorted(found, key=natural_key)}


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _final_names(shards: list[str]) -> dict[str, str]:
    if len(shards) == 1:
        return {shards[0]: SINGLE}
    count = len(shards)
    return {shard: f"model-{number:05d}-of-{count:05d}.safetensors" for number, shard in enumerate(shards, start=1)}


def _start(partial: Path, target: Path, *, fingerprint: str, overwrite: bool, resume: bool) -> Journal:
    """The journal to go on with: the interrupted run's, or a new one in an emptied folder."""
    journal = Journal.load(partial)
    if journal is not None and (journal.parts or has_work(partial)):
        if resume and journal.fingerprint == fingerprint:
            journal.discard_broken(spared=WORKSPACE)
            return journal
        if resume and not overwrite:
            raise OutputError(
                f"The interrupted run for {target} was of another recipe, model or version; "
                "give --overwrite to start again, or name another output."
            )
        if not overwrite:
            done = f"has {len(journal.parts)} parts done" if journal.parts else "was in the middle of its work"
            raise OutputError(
                f"An interrupted run for {target} {done}; "
                "give --resume to go on with it, or --overwrite to start again."
            )
    fresh = Journal(partial, fingerprint)
    fresh.discard_broken()
    return fresh
