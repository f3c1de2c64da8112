"""Text -> windows of token ids -> what a decoder is fed: ids, masks of ones, positions, an empty cache."""

from __future__ import annotations

import os
import zipfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qgraph.batches import load_batches
from qgraph.errors import CalibrationError, ModelError
from qgraph.feeds import Input

Ids = npt.NDArray[np.int64]
WINDOW, SAMPLES = 256, 48
"""Tokens of a window and windows of a calibration, if nothing else is said."""

_PIECE = 1 << 20
"""Characters of text that are tokenized at once."""


def load_windows(path: str | os.PathLike[str], tokenizer: str | os.PathLike[str] | None = None, *, length: int = WINDOW) -> Ids:
    """Token ids [windows, length] of a text file, in its order; what is left at the end is dropped. Nothing is added to the text.

    `tokenizer` is a tokenizer.json or a folder with one. Text is read in pieces that end where a line does. An .npz file holds ids
    instead: one integer array, [windows, length] taken as it is, or [tokens] that is cut.
    Raises CalibrationError: no such file, text that is too short for one window, no ids in the .npz; ModelError for the tokenizer."""
    path = Path(path)
    if not path.is_file():
        raise CalibrationError(f"{path}: no such file of text or token ids")
    ids: Ids = _stored(path) if path.suffix == ".npz" else _tokenized(path, tokenizer)
    if ids.ndim == 1:
        if ids.size < length:
            raise CalibrationError(f"{path} has {ids.size} tokens, less than one window of {length}; give more text or a shorter window")
        ids = ids[: ids.size // length * length].reshape(-1, length)
    return ids


def spread(windows: Ids, count: int | None) -> Ids:
    """`count` of the windows, evenly spread over the text; all of them for None. Raises CalibrationError when there are fewer."""
    if count is None:
        return windows
    if count > len(windows):
        raise CalibrationError(
            f"the text has {len(windows)} windows of {windows.shape[1]} tokens, fewer than the {count} samples asked for"
        )
    chosen: Ids = windows[np.linspace(0, len(windows) - 1, count).round().astype(int)]
    return chosen


def calibration_batches(
    path: str | os.PathLike[str],
    batch: int,
    inputs: Sequence[Input],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    length: int | None = None,
    samples: int | None = None,
) -> Iterable[Any]:
    """With a tokenizer, `samples` windows of a text (48, or all if there are less), evenly spread; without one, `load_batches`.

    Raises CalibrationError as both do, for ids that the model's table lacks, and for options of text without a tokenizer."""
    if tokenizer is None:
        if length is not None or samples is not None:
            raise CalibrationError("the length and the number of windows are for text, which needs the model's tokenizer as well")
        return load_batches(path, batch, [i.name for i in inputs])
    windows = load_windows(path, tokenizer, length=length or WINDOW)
    windows = spread(windows, samples or min(SAMPLES, len(windows)))
    check_ids(windows, min((i.limit for i in inputs if i.limit is not None), default=None), str(path))
    found = TokenBatches(windows, tuple(inputs), batch)
    decoder_feeds(found.inputs, windows[:batch])  # a model that is no decoder is refused before anything runs
    return found


def _stored(path: Path) -> Ids:
    try:
        with np.load(path) as archive:
            found = {name: archive[name] for name in archive.files if not name.startswith("_")}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise CalibrationError(f"{path}: not a readable .npz file of token ids: {error}") from error
    ids = found.get("input_ids", next(iter(found.values())) if len(found) == 1 else None)
    if ids is None or ids.dtype.kind not in "iu" or ids.ndim not in (1, 2) or not ids.size:
        raise CalibrationError(f"{path} holds {', '.join(found) or 'nothing'}; an array input_ids of integers [windows, length] is needed")
    return np.asarray(ids, np.int64)


def _tokenized(path: Path, tokenizer: str | os.PathLike[str] | None) -> Ids:
    if tokenizer is None:
        raise CalibrationError(f"{path} is text: give the tokenizer.json of the model, or a folder with it, as tokenizer")
    encode, ids = _tokenizer(Path(tokenizer)), array("q")
    try:
        with path.open(encoding="utf-8") as file:
            while piece := file.read(_PIECE) + file.readline():
                ids.extend(encode.encode(piece, add_special_tokens=False).ids)
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not text in UTF-8: {error}") from error
    return np.array(ids, np.int64)


def _tokenizer(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ModelError(
            "text is tokenized with the Python package tokenizers, which is not installed; give an .npz of token ids"
        ) from error
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ModelError(f"tokenizer {file} does not exist; a tokenizer.json is needed")
    try:
        return Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises Exception itself
        raise ModelError(f"{file} is no tokenizer.json: {' '.join(str(error).split())}") from error


def check_ids(ids: Ids, rows: int | None, where: str) -> None:
    """Raises CalibrationError for ids that a table of that many `rows` lacks."""
    largest, smallest = int(ids.max(initial=0)), int(ids.min(initial=0))
    if rows is not None and (largest >= rows or smallest < 0):
        worst = smallest if smallest < 0 else largest
        raise CalibrationError(
            f"{where}: token id {worst} is beyond the model's table of {rows} rows; was it made by the model's tokenizer?"
        )


@dataclass(frozen=True)
class Roles:
    """Which input of a decoder is what: the token ids, masks, positions, and the cache in order."""

    ids: Input
    masks: tuple[Input, ...]
    positions: tuple[Input, ...]
    cache: tuple[Input, ...]


def roles(inputs: Sequence[Input]) -> Roles:
    """By types and names: floats of three axes or more are the cache, integers named "...mask..." or "...position..." are these, and the one
    that is left are the ids. Raises ModelError where that is not one."""
    cache = tuple(i for i in inputs if i.type is not None and i.type.is_float and (i.type.rank or 0) >= 3)
    masks, positions = (tuple(i for i in inputs if i not in cache and word in i.name.lower()) for word in ("mask", "position"))
    ids = [i for i in inputs if i not in (*cache, *masks, *positions)]
    if len(ids) != 1:
        found = ", ".join(i.name for i in ids) or "none"
        raise ModelError(f"a decoder takes one array of token ids beside masks, positions and a cache; this model takes {found}")
    return Roles(ids[0], masks, positions, cache)


def empty_cache(known: Roles, rows: int) -> dict[str, npt.NDArray[Any]]:
    """What a decoder's cache holds at the start of `rows` texts: of its free dimensions the first is `rows`, the others are 0."""
    found = {}
    for i in known.cache:
        free, *rest = i.type.shape if i.type is not None and i.type.shape else (None,)
        shape = [free if isinstance(free, int) else rows, *(d if isinstance(d, int) else 0 for d in rest)]
        found[i.name] = np.zeros(shape, i.type.dtype if i.type is not None else None)
    return found


def decoder_feeds(inputs: Sequence[Input], ids: Ids) -> dict[str, npt.NDArray[Any]]:
    """What a decoder takes for the windows `ids` [batch, length], in the order of its inputs: masks of ones, positions that count, an empty
    cache. Raises ModelError for inputs that are not a decoder's, or do not fit."""
    known = roles(inputs)
    feeds: dict[str, npt.NDArray[Any]] = {}
    cache = empty_cache(known, len(ids))
    for i in inputs:
        if i.name in cache:
            feeds[i.name] = cache[i.name]
            continue
        value = ids
        if i is not known.ids:
            value = np.broadcast_to(np.arange(ids.shape[1]), ids.shape) if i in known.positions else np.ones_like(ids)
        feeds[i.name] = value.astype(i.type.dtype if i.type is not None and i.type.dtype is not None else np.int64)
        shape_wanted = None if i.type is None else i.type.shape
        if shape_wanted is not None and not _fits(shape_wanted, ids.shape):
            raise ModelError(
                f"input {i.name!r} is {i.type}, so it takes no windows of shape {list(ids.shape)}; export with free dimensions"
            )
    return feeds


def _fits(wanted: Sequence[Any], shape: tuple[int, ...]) -> bool:
    return len(wanted) == len(shape) and all(not isinstance(d, int) or d == n for d, n in zip(wanted, shape, strict=True))


@dataclass(frozen=True)
class TokenBatches:
    """Feeds of `batch` windows each for a decoder with these `inputs`: re-iterable, with a length."""

    windows: Ids
    inputs: tuple[Input, ...]
    batch: int = 1

    def __len__(self) -> int:
        return (len(self.windows) + self.batch - 1) // self.batch

    def __iter__(self) -> Iterator[dict[str, npt.NDArray[Any]]]:
        for start in range(0, len(self.windows), self.batch):
            yield decoder_feeds(self.inputs, self.windows[start : start + self.batch])
