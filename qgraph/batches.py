"""Calibration files -> batches: `load_batches(path, batch, inputs)` streams .npz files, holding one batch at a time."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from qgraph.errors import CalibrationError, nearest

Feed = dict[str, np.ndarray]


@dataclass(frozen=True)
class FileBatches:
    """Batches of `batch` samples from one .npz file: re-iterable, with a length."""

    path: Path
    batch: int
    names: tuple[str, ...]
    samples: int

    def __len__(self) -> int:
        return (self.samples + self.batch - 1) // self.batch

    def __iter__(self) -> Iterator[Feed]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                arrays = [_Stream(archive, name, self.path) for name in self.names]
                for start in range(0, self.samples, self.batch):
                    rows = min(self.batch, self.samples - start)
                    yield {a.name: a.read(rows) for a in arrays}
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as e:
            raise CalibrationError(f"{self.path}: damaged calibration file: {e}") from e


@dataclass(frozen=True)
class FolderBatches:
    """One feed from each .npz file: re-iterable, with a length."""

    paths: tuple[Path, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Feed]:
        for path in self.paths:
            try:
                with zipfile.ZipFile(path) as archive:
                    yield {name: _Stream(archive, name, path).read(None) for name in _check_names(_members(archive), self.names, path)}
            except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as e:
                raise CalibrationError(f"{path}: not a readable .npz file: {e}") from e


def load_batches(path: str | os.PathLike[str], batch: int, inputs: Iterable[str]) -> FileBatches | FolderBatches:
    """Feeds (dicts of numpy arrays) from `path`, for a model with these input names.

    A .npz file holds one array per input, first axis = samples, fed `batch` at a time (the last batch may be short). A folder of
    .npz files, in the order of their names, holds one feed each. Arrays whose names start with "_" are not read.
    Raises CalibrationError: nothing there, not .npz, arrays missing or unknown, different numbers of samples, pickled objects.
    """
    path, names = Path(path), tuple(inputs)
    if batch < 1:
        raise CalibrationError(f"the batch size must be at least 1, got {batch}")
    if path.is_dir():
        files = tuple(sorted(p for p in path.iterdir() if p.suffix == ".npz" and p.is_file()))
        if not files:
            raise CalibrationError(f"{path}: the folder holds no .npz file")
        return FolderBatches(files, names)
    if not path.exists():
        raise CalibrationError(f"{path}: no such calibration file or folder")
    try:
        with zipfile.ZipFile(path) as archive:
            used = _check_names(_members(archive), names, path)
            lengths = {name: _Stream(archive, name, path).length for name in used}
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as e:
        raise CalibrationError(f"{path}: not a readable .npz file: {e}; save one with numpy.savez(path, {'=..., '.join(names)}=...)") from e
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {n}" for name, n in lengths.items())
        raise CalibrationError(f"{path}: the arrays hold different numbers of samples: {found}")
    return FileBatches(path, batch, used, next(iter(lengths.values()), 0))


def _members(archive: zipfile.ZipFile) -> list[str]:
    return [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy") and not n.startswith("_")]


def _check_names(found: list[str], names: tuple[str, ...], path: Path) -> tuple[str, ...]:
    for name in found:
        if name not in names:
            raise CalibrationError(f"{path}: array {name!r} is no input of the model{nearest(name, names)}")
    for name in names:
        if name not in found:
            raise CalibrationError(f"{path}: no array for the model's input {name!r}{nearest(name, found)}")
    return names


class _Stream:
    """One array of an .npz file, read from its start in pieces of whole samples; stored or compressed."""

    def __init__(self, archive: zipfile.ZipFile, name: str, path: Path) -> None:
        self.name, self._where = name, f"{path}: array {name!r}"
        self._file: IO[bytes] = archive.open(f"{name}.npy")
        try:
            version = np.lib.format.read_magic(self._file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            self._shape, fortran, self._dtype = read(self._file)
        except ValueError as e:
            raise CalibrationError(f"{self._where} is no numpy array: {e}") from e
        if self._dtype.hasobject:
            raise CalibrationError(f"{self._where} holds pickled Python objects, which are never loaded; save plain numbers")
        self._whole: np.ndarray | None = None
        if fortran and len(self._shape) > 1:  # samples are not together in the file
            self._whole, self._next = self._take(self._shape[::-1]).T, 0

    @property
    def length(self) -> int:
        if not self._shape:
            raise CalibrationError(f"{self._where} is a single number; its first axis must count samples")
        return self._shape[0]

    def read(self, rows: int | None) -> np.ndarray:
        """The next `rows` samples, or with None the whole array."""
        if self._whole is not None:
            start, self._next = self._next, self._next + (rows or 0)
            return self._whole if rows is None else self._whole[start : self._next]
        return self._take(self._shape if rows is None else (rows, *self._shape[1:]))

    def _take(self, shape: tuple[int, ...]) -> np.ndarray:
        array = np.empty(shape, self._dtype)
        data = self._file.read(array.nbytes)
        if len(data) != array.nbytes:
            raise EOFError(f"array {self.name!r} ends too early")
        array.reshape(-1).view(np.uint8)[:] = np.frombuffer(data, np.uint8)
        return array
