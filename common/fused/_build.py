"""The fused operator's library: one list of sources and flags, for setup.py and the first call."""

import fcntl
import hashlib
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ["csrc/fused.cpp", "csrc/fused_cpu.cpp"]
CUDA_SOURCES = ["csrc/fused_cuda.cu"]
# libtorch's stable ABI as of 2.11: one library serves that torch and every later one
FLAGS = ["-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
COMMAND = "python setup.py build_ext --inplace"


def library_name() -> str:
    """The name carries a digest of the sources, so that a stale library is never loaded."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "csrc").iterdir()):
        digest.update(path.read_bytes())
    digest.update(" ".join(FLAGS).encode())
    return f"_fused_{digest.hexdigest()[:12]}"


def library() -> Path:
    """The library's path; builds it where it is missing. Raises RuntimeError if that fails."""
    folder = ROOT / "common" / "fused"
    if not (ROOT / "csrc").is_dir():  # installed from a wheel, which has no sources
        found = sorted(folder.glob("_fused_*.so"))
        if not found:
            raise RuntimeError(f"The fused operator is not built. In its sources, run: {COMMAND}")
        return found[0]
    path = folder / f"{library_name()}.so"
    if not path.exists():
        _build(path)
    return path


def _build(path: Path) -> None:
    try:
        (ROOT / "build").mkdir(exist_ok=True)
        with open(ROOT / "build" / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes, one builds
            if path.exists():
                return
            stale = sorted(path.parent.glob("_fused_*.so"))
            why = "its sources have changed" if stale else "it is not built yet"
            print(f"Building the fused operator ({why}): about a minute ...", file=sys.stderr)
            start = time.perf_counter()
            command = [sys.executable, "setup.py", "build_ext", "--inplace"]
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
            for old in stale:
                old.unlink()
            seconds = time.perf_counter() - start
            print(f"Built {path} in {seconds:.0f} s. Ahead of time: {COMMAND}", file=sys.stderr)
    except (OSError, subprocess.CalledProcessError) as error:
        # ninja reports the compiler's errors on stdout, Python its own on stderr
        log = f"{getattr(error, 'stdout', '')}\n{getattr(error, 'stderr', error)}".splitlines()
        tail = "\n".join(
            [line for line in log if "error" in line.lower() or "not found" in line][-8:]
        )
        raise RuntimeError(
            "The fused operator is not built, and building it failed. It needs a C++17 compiler "
            f"(or $CXX), ninja and setuptools; for the whole story run in {ROOT}:\n  {COMMAND}\n"
            f"From the log:\n{tail}"
        ) from error
