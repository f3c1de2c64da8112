"""Where the CUDA headers are, and the folder that keeps what was compiled."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from qgraph.errors import LoweringError

HERE = Path(__file__).resolve().parent


@cache
def cuda_include() -> Path:
    """The folder with cuda_fp16.h: of $CUDA_HOME or $CUDA_PATH, of nvcc, of the wheel nvidia-cuda-runtime. Raises LoweringError."""
    for folder in _candidates():
        if (folder / "cuda_fp16.h").exists():
            return folder
    raise LoweringError(
        "no CUDA headers (cuda_fp16.h) were found: install the wheels nvidia-cuda-runtime, nvidia-cuda-crt and nvidia-cuda-cccl, or set "
        "CUDA_HOME to a toolkit"
    )


def _candidates() -> Iterable[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if variable in os.environ:
            yield Path(os.environ[variable]) / "include"
    if (spec := importlib.util.find_spec("nvidia")) is not None:
        for folder in spec.submodule_search_locations or ():
            yield from sorted(Path(folder).glob("cu*/include"), reverse=True)
    if (nvcc := shutil.which("nvcc")) is not None:
        dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
        for top in re.findall(r"TOP=(\S+)", dry.stderr):
            yield Path(top) / "include"


def include_folders() -> list[Path]:
    """-I folders for kernels: qg.cuh, the CUDA headers, and CCCL where it lies apart."""
    found = [HERE, cuda_include()]
    return [*found, cuda_include() / "cccl"] if (cuda_include() / "cccl").is_dir() else found


def kept(kind: str, suffix: str, *identity: str | bytes) -> Path:
    """The path in $QGRAPH_CUDA_CACHE (default ~/.cache/qgraph/cuda) of what `identity` makes; its folder exists."""
    digest = hashlib.sha256()
    for part in identity:
        raw = part.encode() if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little") + raw)
    root = os.environ.get("QGRAPH_CUDA_CACHE")
    folder = (Path(root) if root else Path.home() / ".cache" / "qgraph" / "cuda") / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{digest.hexdigest()[:32]}{suffix}"


def keep(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all; processes that make the same file do not disturb each other."""
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def elf_size(content: bytes) -> int | None:
    """How long an ELF file (a cubin, a .so) is by its own header, up to the end of the tables of its segments and sections; None where the
    content is no such file."""
    if len(content) < 64 or not content.startswith(b"\x7fELF"):
        return None
    segments, sections = struct.unpack_from("<QQ", content, 32)
    segment_size, segment_count, section_size, section_count = struct.unpack_from("<4H", content, 54)
    return max(int(segments + segment_size * segment_count), int(sections + section_size * section_count))


def whole(path: Path) -> bool:
    """Whether a compiled file is there and not cut off, as a full disk or an unfinished copy of the cache leaves it."""
    content = path.read_bytes() if path.exists() else b""
    size = elf_size(content)
    return size is not None and len(content) >= size


def source(name: str, folder: Path = HERE) -> str:
    """A .cu file followed by everything that it could include: what the key of a compiled file is made of."""
    return "\n".join([(folder / name).read_text(), *(p.read_text() for p in sorted(HERE.glob("*.cuh")))])
