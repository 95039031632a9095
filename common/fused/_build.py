"""The operator's library: one list of sources and flags, for setup.py and for the first call.

Not torch.utils.cpp_extension.load: the lock file of its FileBaton outlives a builder that was
killed, and every later call waits for it for ever. A flock ends with its process. And the sources
and flags are shared with setup.py, so that both build the same library.
"""

import fcntl
import hashlib
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]  # of a checkout
SOURCES = ["csrc/fused.cpp", "csrc/fused_cpu.cpp"]
CUDA_SOURCES = ["csrc/fused_cuda.cu"]
# libtorch's stable ABI as of 2.11: one library serves that torch and every later one
FLAGS = ["-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
COMMAND = "python setup.py build_ext --inplace"
SUFFIXES = (".cpp", ".cu", ".h", ".inc")
_failed = None  # what the build of this process failed with: it is not tried again


def has_sources() -> bool:
    """Whether this is a checkout, and not an installed package (which may lie in a checkout)."""
    files = [ROOT / SOURCES[0], ROOT / "setup.py"]
    return HERE == ROOT / "common" / "fused" and all(path.is_file() for path in files)


def source_files() -> list[Path]:
    """The sources in csrc/, without the files that editors leave there."""
    return sorted(path for path in ROOT.glob("csrc/[!.]*") if path.suffix in SUFFIXES)


def library_name(cuda: bool) -> str:
    """The name carries a digest of the sources, so that a stale library is never loaded, and
    whether the CUDA kernel is in it."""
    digest = hashlib.sha256()
    for path in source_files():
        digest.update(path.read_bytes())
    digest.update(" ".join(FLAGS).encode())
    return f"_fused_{digest.hexdigest()[:12]}_{'cuda' if cuda else 'cpu'}"


def built_library() -> Path | None:
    """The library's path, the one with the CUDA kernel first; None where there is none."""
    if has_sources():
        found = [HERE / f"{library_name(cuda)}.so" for cuda in (True, False)]
        return next((path for path in found if path.exists()), None)
    return next((p for kind in ("cuda", "cpu") for p in HERE.glob(f"_fused_*_{kind}.so")), None)


def library() -> Path:
    """The library's path; builds it where it is missing. Raises RuntimeError if that fails, at once
    where it has failed before."""
    global _failed
    path = built_library()
    if path is not None:
        return path
    if not has_sources():
        raise RuntimeError(f"The fused operator is not built. In its sources, run: {COMMAND}")
    if _failed is None:
        try:
            return _build()
        except (OSError, subprocess.CalledProcessError) as error:
            _failed = _reason(error)
    raise RuntimeError(f"The fused operator is not built, and building it failed. {_failed}")


def _build() -> Path:
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes, one builds
        if path := built_library():
            return path
        stale = sorted(HERE.glob("_fused_*.so"))
        why = "its sources have changed" if stale else "it is not built yet"
        print(f"Building the fused operator ({why}): about a minute ...", file=sys.stderr)
        start = time.perf_counter()
        (HERE / ".writable").touch()  # a read-only folder must fail now, not after a minute
        (HERE / ".writable").unlink()
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        held = {"pass_fds": [lock.fileno()]}  # the build keeps the lock even if this process ends
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, **held)
        for old in stale:
            old.unlink(missing_ok=True)
        path = built_library()
        if path is None:
            raise FileNotFoundError(f"{' '.join(command)} has left no library in {HERE}")
        seconds = time.perf_counter() - start
        print(f"Built {path} in {seconds:.0f} s. Ahead of time: {COMMAND}", file=sys.stderr)
        return path


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error}. Where {ROOT} can be written, run:\n  {COMMAND}"
    # ninja reports the compiler's errors on stdout, Python its own on stderr
    log = f"{error.stdout or ''}\n{error.stderr or ''}".splitlines()
    lines = [line for line in log if "error" in line.lower() or "not found" in line]
    return (
        "It needs a C++17 compiler (or $CXX), ninja and setuptools >= 77.\nFor the whole log run "
        f"in {ROOT}:\n  {COMMAND}\nFrom the log:\n" + "\n".join(lines[-8:])
    )
