"""Where something came from in the user's own source: from a traceback, or from the stack trace that export kept at a node."""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path
from traceback import FrameSummary

import torch
from torch.fx import Node

_FRAME = re.compile(r'File "(?P<file>.+?)", line (?P<line>\d+), in (?P<name>\S+)(?:\n\s+(?P<code>[^\n]*))?')
_SITE = tuple({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
_STANDARD = sysconfig.get_path("stdlib")
# Frames of these packages are machinery on the way to the line that the user wrote, or below it.
_LIBRARIES = tuple(f"{site}/{name}/" for site in _SITE for name in ("numpy", "torchgen", "sympy"))
_MACHINERY = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parent}/", *_LIBRARIES)


def error_line(error: BaseException) -> str | None:
    """`file.py:12: if x.sum() > 0:` for the innermost line of user code that the error passed, None if there is none."""
    return _spell(_own(traceback.extract_tb(error.__traceback__)))


def source_line(node: Node) -> str | None:
    """The same for the node's stack trace."""
    return _spell(_own(_frames(node)))


def source_place(node: Node) -> str | None:
    """`file.py:12` alone."""
    frame = _own(_frames(node))
    return None if frame is None else f"{frame.filename}:{frame.lineno}"


def _frames(node: Node) -> list[FrameSummary]:
    found = _FRAME.finditer(node.meta.get("stack_trace") or "")
    return [FrameSummary(m["file"], int(m["line"]), m["name"], line=m["code"] or "", lookup_line=False) for m in found]


def _own(frames: Iterable[FrameSummary]) -> FrameSummary | None:
    """The innermost frame outside of installed packages, else the innermost one in a package that defines models."""
    outer = [f for f in frames if not _is_machinery(f.filename)]
    mine = [f for f in outer if not f.filename.startswith(_SITE)]
    return mine[-1] if mine else outer[-1] if outer else None


def _is_machinery(file: str) -> bool:
    in_standard = file.startswith(_STANDARD) and not file.startswith(_SITE)
    return file.startswith(("<", *_MACHINERY)) or in_standard


def _spell(frame: FrameSummary | None) -> str | None:
    return None if frame is None else f"{frame.filename}:{frame.lineno}: {(frame.line or '').strip()}"
