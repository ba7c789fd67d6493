"""Compiled programs are kept between runs, in the user's cache folder: what was compiled once starts at once.

Programs for a processor use all that it can do, so each kind of processor has a folder of its own: a home folder may be
shared by many machines. JAX sees to the rest: its key is the program, the compiler's version and its options.
`JAX_COMPILATION_CACHE_DIR` chooses another folder, and `JAX_ENABLE_COMPILATION_CACHE=false` keeps nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import sys
from pathlib import Path

MAX_BYTES = 2 * 1024**3
"""What the programs of a kind of processor may take; the oldest go first."""


def keep_compiled_programs() -> None:
    """From now on, this process and those that it starts keep what they compile, and look there first."""
    folder = _folder()
    forget_oldest(folder, MAX_BYTES)
    settings: dict[str, str | float] = {
        "jax_compilation_cache_dir": str(folder),
        # By default, what takes less than a second is not kept; that is nearly everything here.
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    for name, value in settings.items():
        os.environ.setdefault(name.upper(), str(value))
    if "jax" in sys.modules:
        # JAX reads the environment when it is imported.
        import jax

        for name, value in settings.items():
            jax.config.update(name, type(value)(os.environ[name.upper()]))  # type: ignore[no-untyped-call]


def forget_oldest(folder: Path, max_bytes: int) -> None:
    """Removes the programs that were kept first, until the others take no more than `max_bytes`.

    JAX can bound its folder too, but then looks through all of it whenever it keeps a program.
    """
    kept = []
    for path in folder.glob("*-cache"):
        # Other processes may be at it as well.
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            kept.append((found.st_mtime_ns, found.st_size, path))
    excess = sum(size for _, size, _ in kept) - max_bytes
    for _, size, path in sorted(kept):
        if excess <= 0:
            break
        path.unlink(missing_ok=True)
        excess -= size


def _folder() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("robopref")) / "compiled" / _processor()


def _processor() -> str:
    """A name for what this machine's processor can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return hashlib.sha256("\n".join([platform.machine(), platform.processor(), *told]).encode()).hexdigest()[:12]
