"""attention.c, compiled on its first use where there is a C compiler; without one everything is done by torch."""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("attention.c")
# No -ffast-math: NaN must stay NaN, and it would change rounding in all of the process.
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
_BLOCK = [c_int64] * 3 + [c_void_p]  # captions, images, regions, starts
ARGUMENTS = {
    "score_i2t": [c_void_p, *_BLOCK, c_float, c_int, *[c_void_p] * 3, c_int64, *[c_void_p] * 2, c_int64, c_int],
    "weigh_t2i": [c_void_p, *_BLOCK, c_float, c_int, *[c_void_p] * 4, c_int],
    "score_t2i": [c_void_p] * 2 + [c_int64] * 2 + [c_void_p] * 3 + [*_BLOCK, c_void_p, c_int],
}


@cache
def attention_library() -> ctypes.CDLL | None:
    """The compiled functions of attention.c; None without a compiler, outside of Linux and where HACAN_EAGER is set.

    It is kept in ~/.cache/hacan (or $XDG_CACHE_HOME/hacan), by source, compiler and processor. The compiler is $CC, or
    cc. A compiler that fails is warned of, once a process.
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if os.environ.get("HACAN_EAGER") or platform.system() != "Linux" or shutil.which(compiler[0]) is None:
        return None
    try:
        library = _load(compiler)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # RuntimeError: there is no home folder
        why = (getattr(error, "stderr", None) or "").strip() or str(error)
        log.warning(
            "%s could not make a library of %s, so scores on the CPU are computed without it, the same and more slowly "
            "(HACAN_EAGER=1 asks for that): %s", shlex.join(compiler), SOURCE.name, why.splitlines()[0],
        )  # fmt: skip
        return None
    for name, types in ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    return library


def _load(compiler: list[str]) -> ctypes.CDLL:
    """From the cache, where it is compiled to if need be; from a temporary folder where the cache cannot be written."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hacan"
    kept = folder / f"attention-{_fingerprint(compiler)}.so"
    if kept.exists():
        return ctypes.CDLL(str(kept))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = tempfile.TemporaryDirectory(dir=folder)
    except OSError:
        place = tempfile.TemporaryDirectory()
    with place as inside:
        library = _compile(compiler, Path(inside))
        loaded = ctypes.CDLL(str(library))
        if Path(inside).parent == folder:
            library.replace(kept)  # at once: another process may be about to load it
        return loaded


def _compile(compiler: list[str], folder: Path) -> Path:
    part, library = folder / "attention.o", folder / "attention.so"
    _run(*compiler, *FLAGS, "-c", str(SOURCE), "-o", str(part))
    # Without -fopenmp: the functions of OpenMP are those that torch has loaded, so that there is one pool of threads.
    _run(*compiler, "-shared", str(part), "-o", str(library), "-lm")
    return library


def _fingerprint(compiler: list[str]) -> str:
    """What the library depends on: a home folder may be shared by machines with other processors."""
    cpuinfo = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    features = [line for line in cpuinfo if line.lower().startswith(("flags", "features", "model name", "cpu part"))]
    version = _run(*compiler, "--version")
    parts = [SOURCE.read_text(), *FLAGS, *compiler, version, platform.machine(), *features]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
