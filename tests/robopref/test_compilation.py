"""What one process compiled, another one finds, unless the user says otherwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from robopref.compilation import forget_oldest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import json, sys
if "early" in sys.argv:
    import jax
from robopref.compilation import keep_compiled_programs
keep_compiled_programs()
keep_compiled_programs()
import jax, jax.numpy as jnp
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
result = jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x).T)(jnp.arange(6.0).reshape(2, 3))
hits = events.count("/jax/compilation_cache/cache_hits")
print(json.dumps({"hits": hits, "folder": jax.config.jax_compilation_cache_dir, "result": result.tolist()}))
"""


def compile_something(home: Path, *arguments: str, **variables: str) -> dict[str, object]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=ROOT,
        env=kept | {"XDG_CACHE_HOME": str(home), "JAX_PLATFORMS": "cpu", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    said: dict[str, object] = json.loads(answer.stdout)
    return said


@pytest.mark.parametrize("arguments", [(), ("early",)], ids=["before JAX is imported", "after JAX is imported"])
def test_what_one_process_compiled_another_one_finds(arguments: tuple[str, ...], tmp_path: Path) -> None:
    first, second = (compile_something(tmp_path, *arguments) for _ in range(2))
    assert first["hits"] == 0
    assert second["hits"] == len(list(tmp_path.glob("robopref/compiled/*/*-cache"))) > 0
    assert second["result"] == first["result"]


def test_the_user_may_choose_the_folder_or_keep_nothing(tmp_path: Path) -> None:
    chosen = tmp_path / "chosen"
    said = compile_something(tmp_path / "home", JAX_COMPILATION_CACHE_DIR=str(chosen))
    assert said["folder"] == str(chosen)
    assert list(chosen.glob("*-cache"))
    assert not (tmp_path / "home").exists()
    compile_something(tmp_path / "home", JAX_ENABLE_COMPILATION_CACHE="false")
    assert not list((tmp_path / "home").rglob("*-cache"))


def test_the_oldest_programs_are_forgotten_first(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "middle", "old")):
        path = tmp_path / f"{name}-cache"
        path.write_bytes(bytes(100))
        os.utime(path, (1000 - age, 1000 - age))
    (tmp_path / "other").write_bytes(bytes(1000))
    forget_oldest(tmp_path, 300)
    assert len(list(tmp_path.glob("*-cache"))) == 3
    forget_oldest(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["middle-cache", "new-cache", "other"]
    forget_oldest(tmp_path / "nowhere", 0)
