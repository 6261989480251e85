"""What a run has finished so far, on disk: one JSON line for the run and one for each part, appended and fsynced."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from .shards import disk_errors, file_sha256, sync_folder, write_all, write_file

NAME: Final = ".modelzip-journal.jsonl"
VERSION: Final = 1


@dataclass(frozen=True)
class Part:
    """A shard that is written, and what it stands for."""

    part: str
    file: str
    size: int  # bytes
    sha256: str
    replaces: tuple[str, ...]
    tensors: tuple[str, ...]
    record: dict[str, Any]

    def is_intact(self, folder: Path) -> bool:
        file = folder / self.file
        if not file.is_file() or file.stat().st_size != self.size:
            return False
        return file_sha256(file) == self.sha256


@dataclass
class Journal:
    folder: Path
    fingerprint: str
    parts: dict[str, Part] = field(default_factory=dict)

    @classmethod
    def create(cls, folder: Path, fingerprint: str) -> Journal:
        journal = cls(folder, fingerprint)
        journal.rewrite()
        return journal

    @classmethod
    def load(cls, folder: Path) -> Journal | None:
        """The journal of an interrupted run, less what is torn or no longer intact; None if there is none."""
        try:
            lines = (folder / NAME).read_bytes().split(b"\n")
        except FileNotFoundError:
            return None
        entries = []
        for line in lines[:-1]:  # what follows the last newline is torn
            try:
                entries.append(json.loads(line))
            except ValueError:
                break
        if not entries or entries[0].get("version") != VERSION:
            return None
        journal = cls(folder, entries[0]["fingerprint"])
        for entry in entries[1:]:
            if "finishing" in entry:
                _rename_back(folder, entry["finishing"])
                continue
            part = Part(**{**entry, "replaces": tuple(entry["replaces"]), "tensors": tuple(entry["tensors"])})
            journal.parts[part.part] = part
        return journal

    def discard_broken(self, *, spared: str | None = None) -> None:
        """Forget the parts whose files aren't intact, and remove everything that belongs to no part, but the folder
        `spared`."""
        self.parts = {name: part for name, part in self.parts.items() if part.is_intact(self.folder)}
        self.rewrite()
        kept = {NAME, *(part.file for part in self.parts.values())}
        with disk_errors(self.folder):
            for entry in self.folder.iterdir():
                if entry.is_dir():
                    if entry.name != spared:
                        shutil.rmtree(entry)
                elif entry.name not in kept:
                    entry.unlink()

    def add(self, part: Part) -> None:
        self._append(asdict(part))
        self.parts[part.part] = part

    def finishing(self, names: dict[str, str]) -> None:
        """Say, before it is done, which part files get which final names, so that a resumed run finds them."""
        self._append({"finishing": names})

    def rewrite(self) -> None:
        lines = [{"version": VERSION, "fingerprint": self.fingerprint}, *map(asdict, self.parts.values())]
        draft = self.folder / f"{NAME}.draft"
        write_file(draft, b"".join(_line(line) for line in lines))
        with disk_errors(self.folder):
            draft.rename(self.folder / NAME)
            sync_folder(self.folder)

    def _append(self, entry: dict[str, Any]) -> None:
        line = _line(entry)
        with disk_errors(self.folder, need=len(line)), (self.folder / NAME).open("ab", buffering=0) as stream:
            write_all(stream.fileno(), line)
            os.fsync(stream.fileno())


def started_for(folder: Path) -> str | None:
    """The fingerprint of the run that a folder's journal is of; None if there is no journal."""
    try:
        first = (folder / NAME).read_bytes().partition(b"\n")[0]
        return str(json.loads(first)["fingerprint"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return None


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True).encode() + b"\n"


def _rename_back(folder: Path, names: dict[str, str]) -> None:
    with disk_errors(folder):
        for old, new in names.items():
            if (folder / new).exists() and not (folder / old).exists():
                (folder / new).rename(folder / old)
