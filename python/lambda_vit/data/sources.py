"""Sources of images: the files of a folder, or the members of a zip that is read in place; and their splits."""

from __future__ import annotations

import contextlib
import dataclasses
import mimetypes
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..runtime.progress import track

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "validation", "valid", "eval", "evaluation", "test", "testing")
SPLIT_NAMES = (*TRAIN_NAMES, *VAL_NAMES)


@dataclasses.dataclass
class Folder:
    """Images under a folder. Paths are relative to it, with forward slashes."""

    root: Path

    def folders(self, at: str) -> list[str]:
        return [entry.name for entry in _scan(self.root / at) if _is_folder(entry)]

    def images(self, at: str) -> dict[str, list[str]]:
        """The images of each class folder in `at`, at any depth; the list of an empty folder is empty.

        Raises:
            ValueError: A link to something that does not exist may be a class folder.
        """
        for entry in _scan(self.root / at):
            is_file = _is_image(entry.name) or mimetypes.guess_type(entry.name)[0] is not None
            if entry.is_symlink() and not os.path.exists(entry.path) and not is_file:
                raise ValueError(
                    f"{entry.path} is a link to {os.readlink(entry.path)}, which does not exist: if this is a class folder, "
                    "its images are missing. Restore what the link refers to, or remove the link"
                )
        names = track(self.folders(at), "List images")
        return {name: sorted(self._walk(_join(at, name), (), set())) for name in names}

    def has_images(self, at: str) -> bool:
        """Whether the folder itself has images."""
        return any(_is_image(entry.name) and not _is_folder(entry) for entry in _scan(self.root / at))

    def _walk(self, at: str, above: tuple[str, ...], seen: set[str]) -> Iterator[str]:
        """The images in `at`, each once: links to a folder around it, or to a folder that was seen, are not followed."""
        here = os.path.realpath(self.root / at)
        if here in seen:
            return
        seen.add(here)
        above = (*above, here)
        # Links come last, so that an image has the path of its own folder.
        for entry in sorted(_scan(self.root / at), key=os.DirEntry.is_symlink):
            path = f"{at}/{entry.name}"
            if not _is_folder(entry):
                if _is_image(entry.name):
                    yield path
            elif not entry.is_symlink() or not any(_contains(os.path.realpath(entry.path), folder) for folder in above):
                yield from self._walk(path, above, seen)

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def size(self, path: str) -> int:
        """Bytes of a file; -1 if there is none, as behind a broken link: reading it then reports the image."""
        try:
            return (self.root / path).stat().st_size
        except OSError:
            return -1

    def show(self, path: str) -> str:
        return str(self.root / path)


class _Archive(NamedTuple):
    """A zip that this process opened."""

    process: int
    file: zipfile.ZipFile
    members: dict[str, zipfile.ZipInfo]  # by path
    folders: dict[str, set[str]]  # names of the folders in each folder that is not hidden


class Zip:
    """Images inside a zip. Every process opens its own handle: a handle shared after a fork would share its position, and
    handles cannot be pickled.

    Paths are those of the members with forward slashes and without "./" or a leading slash, however they were archived.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._opened: _Archive | None = None
        self._with_images: set[str] | None = None
        locked = next((i.filename for i in self._archive().members.values() if i.flag_bits & 1), None)
        if locked is not None:
            raise ValueError(f"root={str(root)!r} is an encrypted zip ({locked}): pass one without a password")

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_opened": None, "_with_images": None}

    def _archive(self) -> _Archive:
        if self._opened is None or self._opened.process != os.getpid():
            file = zipfile.ZipFile(self.root)
            members = dict(zip(_member_paths(file.infolist()), file.infolist(), strict=True))
            folders: dict[str, set[str]] = {"": set()}
            for path in filter(is_visible, members):
                inside = path.rpartition("/")[0]
                while inside and inside not in folders:
                    folders[inside] = set()
                    inside = inside.rpartition("/")[0]
            for path in filter(None, folders):
                above, _, name = path.rpartition("/")
                folders[above].add(name)
            self._opened = _Archive(os.getpid(), file, members, folders)
        return self._opened

    def folders(self, at: str) -> list[str]:
        return sorted(self._archive().folders.get(at, ()))

    def images(self, at: str) -> dict[str, list[str]]:
        """The images of each class folder in `at`, at any depth; the list of an empty folder is empty."""
        grouped: dict[str, list[str]] = {name: [] for name in self.folders(at)}
        prefix = _join(at, "")
        for path in self._archive().members:
            folder, slash, _ = path.removeprefix(prefix).partition("/")
            if path.startswith(prefix) and slash and _is_image(path):
                grouped[folder].append(path)
        return {folder: sorted(paths) for folder, paths in grouped.items()}

    def has_images(self, at: str) -> bool:
        """Whether the folder itself has images."""
        if self._with_images is None:  # one pass for all folders that are asked for
            self._with_images = {path.rpartition("/")[0] for path in self._archive().members if _is_image(path)}
        return at in self._with_images

    def read(self, path: str) -> bytes:
        archive = self._archive()
        return archive.file.read(archive.members[path])

    def size(self, path: str) -> int:
        return self._archive().members[path].file_size

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
    """(name of the split found, its path, the path of the train split if there is one).

    Raises:
        ValueError: The split is not there, or several folders could be it.
    """
    top, present = _find_splits(source)
    if not present:
        folders = source.folders(top)
        if folders and all(name.lower() in SPLIT_NAMES for name in folders):
            raise ValueError(
                f"{', '.join(folders)} in {source.root} have no class folders: expected <split>/<class>/<image>, such "
                "as train/all/<image> if there are no labels"
            )
        return "all", top, None
    train = next((present[name] for name in TRAIN_NAMES if name in present), None)
    if split in present:
        return split, present[split], train
    names = TRAIN_NAMES if split == "train" else VAL_NAMES if split == "val" else ()
    aliases = [name for name in names if name in present]
    if len(aliases) > 1:
        raise ValueError(
            f"split={split!r} could be any of {', '.join(aliases)} in {source.root}: ask for one of them by name"
        )
    if aliases:
        return split, present[aliases[0]], train
    listed = ", ".join(path.rpartition("/")[2] for path in present.values())
    flat = [
        name
        for name in source.folders(top)
        if name.lower() in (split, *names) and _join(top, name) not in present.values()
    ]
    reason = f" (its folder {flat[0]} has no class folders)" if flat else ""
    raise ValueError(f"split={split!r} is not in {source.root}: it has {listed}{reason}")


def _find_splits(source: Folder | Zip) -> tuple[str, dict[str, str]]:
    """The folder that has the splits, and the path of each by its name in lower case; without splits, that of the classes."""
    top, folders = "", source.folders("")
    present = _splits_in(source, top, folders)
    while not present and len(folders) == 1 and (below := source.folders(_join(top, folders[0]))):
        top, folders = _join(top, folders[0]), below
        present = _splits_in(source, top, folders)
    if present:
        return top, present
    # No splits below the lone folder at the top either: at most that one is around the classes.
    folders = source.folders("")
    if len(folders) == 1:
        return (folders[0] if source.folders(folders[0]) else ""), {}
    if len(folders) > 8:  # classes: looking into each of many would take as long as listing all images
        return "", {}
    inside = {name: found for name in folders if (found := _splits_in(source, name, source.folders(name)))}
    if len(inside) > 1:
        raise ValueError(f"several folders of {source.root} have splits: {', '.join(inside)}. Name one of them")
    for name, found in inside.items():
        if others := [other for other in folders if other != name and source.has_images(other)]:
            raise ValueError(
                f"{source.root} has splits in {name} beside folders with images ({', '.join(others[:3])}): name the folder "
                "that you mean"
            )
        return name, found
    return "", {}


def _splits_in(source: Folder | Zip, top: str, folders: list[str]) -> dict[str, str]:
    """The path of each split in `top` by its name in lower case. A folder without class folders is none."""
    found: dict[str, str] = {}
    for name in folders:
        if name.lower() in SPLIT_NAMES and source.folders(_join(top, name)):
            if name.lower() in found:
                raise ValueError(f"{found[name.lower()]} and {name} in {source.root} differ in case alone: rename one")
            found[name.lower()] = _join(top, name)
    if len(found) == 1:
        others = [name for name in folders if name.lower() not in SPLIT_NAMES and source.has_images(_join(top, name))]
        if others:
            path = next(iter(found.values()))
            raise ValueError(
                f"{source.root} has a folder {path!r} with folders in it beside folders with images "
                f"({', '.join(others[:3])}): it may be a split or a class. If it is a split, move the other folders "
                "elsewhere; if it is a class, rename it, or move all classes into train/ and val/"
            )
    return found


def _join(top: str, name: str) -> str:
    return f"{top}/{name}" if top else name


def extensions() -> tuple[str, ...]:
    """The suffixes of images, in lower case: timm's, to which callers can add, and the others of torchvision."""
    from timm.data.readers import get_img_extensions

    return (*get_img_extensions(), ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if is_visible(entry.name)), key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


def _contains(folder: str, path: str) -> bool:
    return os.path.commonpath((folder, path)) == folder


def _member_paths(members: list[zipfile.ZipInfo]) -> Iterator[str]:
    """The paths of all members of an archive with forward slashes; that of a folder ends with a slash."""
    says_utf8 = 0x800
    names = [member.filename for member in members]
    unsaid = [i for i, member in enumerate(members) if not member.flag_bits & says_utf8]
    # Archives of macOS hold UTF-8 without saying so, which zipfile reads as the code page of DOS. Only if all names are
    # UTF-8: some names in other code pages look like it, and one folder must not have two names.
    with contextlib.suppress(UnicodeError):
        decoded = [names[i].encode("cp437").decode("utf-8") for i in unsaid]
        for i, name in zip(unsaid, decoded, strict=True):
            names[i] = name
    for name in names:
        slashed = name.replace("\\", "/")
        parts = [part for part in slashed.split("/") if part not in ("", ".")]
        yield "/".join(parts) + "/" * slashed.endswith("/")


def _is_image(name: str) -> bool:
    return is_visible(name) and name.lower().endswith(extensions())


def is_visible(path: str) -> bool:
    """Whether no part of a path is hidden, as the files that macOS adds to archives are."""
    return not any((part.startswith(".") and part != ".") or part == "__MACOSX" for part in path.split("/"))
