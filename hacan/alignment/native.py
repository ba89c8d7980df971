"""attention.c, compiled on its first use where there is a C compiler; without one everything is done by torch."""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("attention.c")
# No -ffast-math: NaN must stay NaN.
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
_BLOCK = [c_int64] * 3 + [c_void_p]  # captions, images, regions, starts
ARGUMENTS = {
    "work_i2t": [c_int64, c_int64],
    "score_i2t": [c_void_p, *_BLOCK, c_float, c_int, *[c_void_p] * 3, c_int64, *[c_void_p] * 2, c_int64, c_int],
    "weigh_t2i": [c_void_p, *_BLOCK, c_float, c_int, *[c_void_p] * 4, c_int],
    "score_t2i": [c_void_p] * 2 + [c_int64] * 2 + [c_void_p] * 3 + [*_BLOCK, c_void_p, c_int],
}


@cache
def attention_library() -> ctypes.CDLL | None:
    """The compiled functions of attention.c; None without a compiler, outside of Linux and with HACAN_EAGER=1.

    The compiler is $CC, or cc, and must be gcc or make what gcc makes: its OpenMP is that of torch. What it made is
    kept in ~/.cache/hacan (or $XDG_CACHE_HOME/hacan), by source, compiler and processor; where that folder cannot be
    written, or could be by others, every process compiles for itself. A compiler that fails is warned of.
    """
    if os.environ.get("HACAN_EAGER", "0") not in ("", "0") or platform.system() != "Linux":
        return None
    try:
        compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
        if shutil.which(compiler[0]) is None:
            return None
        library = _load(compiler)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or [repr(error)]
        log.warning(
            "%s could not make a library of %s, so scores on the CPU are computed without it, the same and more slowly "
            "(CC=gcc names a compiler, HACAN_EAGER=1 asks for none): %s",
            os.environ.get("CC") or "cc", SOURCE.name, next((line for line in lines if "error" in line), lines[0]),
        )  # fmt: skip
        return None
    for name, types in ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    library.work_i2t.restype = c_int64
    return library


def _load(compiler: list[str]) -> ctypes.CDLL:
    """From the cache, where it is compiled to if need be; else from a temporary folder."""
    folder, name = _cache_folder(), f"attention-{_fingerprint(compiler)}.so"
    if folder is not None:
        try:
            return ctypes.CDLL(str(folder / name))
        except OSError:
            pass  # not there, or spoilt: it is made anew
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as inside:
        library = _compile(compiler, Path(inside))
        loaded = ctypes.CDLL(str(library))
        if folder is not None:
            library.replace(folder / name)  # at once: another process may be about to load it
        return loaded


def _cache_folder() -> Path | None:
    """Where the library is kept; None where nothing can be kept that only this user can change."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "hacan"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    ours = state.st_uid == os.getuid() and not state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if ours and os.access(folder, os.W_OK | os.X_OK) else None


def _compile(compiler: list[str], folder: Path) -> Path:
    part, library = folder / "attention.o", folder / "attention.so"
    _run(*compiler, *FLAGS, "-c", str(SOURCE), "-o", str(part))
    # Without -fopenmp: the functions of OpenMP are those that torch has loaded, so that there is one pool of threads.
    _run(*compiler, "-shared", str(part), "-o", str(library), "-lm")
    return library


def _fingerprint(compiler: list[str]) -> str:
    """What the library depends on."""
    parts = [SOURCE.read_text(), *FLAGS, *compiler, _run(*compiler, "--version"), *_processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> list[str]:
    """What -march=native looks at: a home folder may be shared by machines with different ones."""
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    told = ("flags", "features", "model name", "cpu part")
    return [platform.machine(), *(line for line in first if line.lower().startswith(told))]


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, errors="replace").stdout
