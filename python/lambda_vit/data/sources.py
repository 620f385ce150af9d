"""Sources of images: the files of a folder, or the members of a zip that is read in place; and their splits."""

from __future__ import annotations

import dataclasses
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..runtime.progress import track

VAL_NAMES = ("val", "validation", "valid", "test")
SPLIT_NAMES = ("train", *VAL_NAMES)


@dataclasses.dataclass
class Folder:
    """Images under a folder. Paths are relative to it, with forward slashes."""

    root: Path

    def folders(self, at: str) -> list[str]:
        with os.scandir(self.root / at) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and is_visible(entry.name))

    def images(self, at: str) -> dict[str, list[str]]:
        """The images of each class folder in `at`, at any depth; the list of an empty folder is empty."""
        return {name: sorted(self._walk(self.root / at / name)) for name in track(self.folders(at), "List images")}

    def _walk(self, folder: Path) -> Iterator[str]:
        # Class folders are often links to one big store, hence followlinks.
        for here, folders, files in os.walk(folder, followlinks=True):
            folders[:] = filter(is_visible, folders)
            yield from ((Path(here) / f).relative_to(self.root).as_posix() for f in files if _is_image(f))

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def size(self, path: str) -> int:
        return (self.root / path).stat().st_size

    def show(self, path: str) -> str:
        return str(self.root / path)


class Zip:
    """Images inside a zip. Every process opens its own handle: a handle shared after a fork would share its position, and
    handles cannot be pickled."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        locked = next((i.filename for i in self._handle().infolist() if i.flag_bits & 1), None)
        if locked is not None:
            raise ValueError(f"root={str(root)!r} is an encrypted zip ({locked}): pass one without a password")

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_opened": None}

    def _handle(self) -> zipfile.ZipFile:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), zipfile.ZipFile(self.root))
        return self._opened[1]

    def _inside(self, at: str) -> Iterator[tuple[str, str, str]]:
        """(member, first folder, rest) of each member that is at least one folder deep in `at`."""
        prefix = f"{at}/" if at else ""
        for member in dict.fromkeys(self._handle().namelist()):
            folder, slash, rest = member.removeprefix(prefix).partition("/")
            if member.startswith(prefix) and folder and slash and is_visible(member):
                yield member, folder, rest

    def folders(self, at: str) -> list[str]:
        return sorted({folder for _, folder, _ in self._inside(at)})

    def images(self, at: str) -> dict[str, list[str]]:
        grouped: dict[str, list[str]] = {}
        for member, folder, rest in self._inside(at):
            paths = grouped.setdefault(folder, [])
            if _is_image(rest):
                paths.append(member)
        return {folder: sorted(grouped[folder]) for folder in sorted(grouped)}

    def read(self, path: str) -> bytes:
        return self._handle().read(path)

    def size(self, path: str) -> int:
        return self._handle().getinfo(path).file_size

    def show(self, path: str) -> str:
        return f"{self.root}!{path}"


def open_source(root: Path) -> Folder | Zip:
    if root.is_dir():
        return Folder(root)
    if not root.exists():
        raise ValueError(f"root={str(root)!r} does not exist: pass a folder or a zip of <split>/<class>/<image>")
    try:
        return Zip(root)
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"root={str(root)!r} is neither a folder nor an intact zip ({error}): unpack other archives first"
        ) from error


def find_split(source: Folder | Zip, split: str) -> tuple[str, str, str | None]:
    """(name of the split found, its path, the path of the train split if there is one)."""
    top, folders = "", source.folders("")
    if len(folders) == 1 and folders[0] not in SPLIT_NAMES and source.folders(folders[0]):
        top, folders = f"{folders[0]}/", source.folders(folders[0])
    present = [name for name in SPLIT_NAMES if name in folders]
    if not present:
        return "all", top.rstrip("/"), None
    found = split
    if split == "val" and "val" not in present:
        aliases = [name for name in present if name != "train"]
        if len(aliases) > 1:
            raise ValueError(
                f"split='val' could be any of {', '.join(aliases)} in {source.root}: ask for one of them by name"
            )
        found = aliases[0] if aliases else split
    if found not in present:
        raise ValueError(f"split={split!r} is not in {source.root}: it has {', '.join(present)}")
    return split, top + found, f"{top}train" if "train" in present else None


def extensions() -> tuple[str, ...]:
    from timm.data.readers import get_img_extensions

    return get_img_extensions()


def _is_image(name: str) -> bool:
    return is_visible(name) and name.lower().endswith(extensions())


def is_visible(path: str) -> bool:
    """Whether no part of a path is hidden, as the files that macOS adds to archives are."""
    return not any((part.startswith(".") and part != ".") or part == "__MACOSX" for part in path.split("/"))
