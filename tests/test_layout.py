"""The tree keeps to its own rules: who imports whom, what is documented and tested, what is pinned."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY, BESIDE, EXPERIMENTS = "robopref", ("envs", "agents", "labelers"), "experiments"
PACKAGES = (LIBRARY, *BESIDE, EXPERIMENTS)
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in MODULES]

MAY_IMPORT = {
    LIBRARY: {LIBRARY},
    **{package: {LIBRARY, package} for package in BESIDE},
    EXPERIMENTS: set(PACKAGES),
}
RUNS_WITHOUT_JAX = ("client.py", "safety.py", "rig.py")
HEAVY = {"jax", "jaxlib", "flax", "optax"}
DISTRIBUTIONS = {"PIL": "pillow", "ott": "ott-jax"}
OPTIONAL = {"ot", "ray", "robosuite"}
REQUIREMENT_FILES = (
    "requirements.txt",
    "requirements-test.txt",
    "requirements-ray.txt",
    "requirements-benchmark.txt",
    "requirements-robomimic.txt",
    "constraints.txt",
)
TEXT = {".py", ".toml", ".txt", ".md", ".cfg", ".html", ".css", ".js", ".json", ".sh", ""}
UNTRACKED = {".git", ".venv", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", "__pycache__", "build"}


def imported_modules(source: str, package: str) -> Iterator[str]:
    """Absolute dotted names of everything that a module imports, at any depth; calls of import_module included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def imports_of(path: Path) -> list[str]:
    return list(imported_modules(path.read_text(encoding="utf-8"), ".".join(path.relative_to(ROOT).parent.parts)))


def is_lazy(node: ast.AST, tree: ast.Module) -> bool:
    functions = [each for each in ast.walk(tree) if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
    return any(node is inner for function in functions for inner in ast.walk(function))


def forbidden(path: Path, name: str) -> bool:
    """Whether the module at `path` may not import `name`."""
    package, target = path.relative_to(ROOT).parts[0], name.split(".")
    if target[0] == "tests":
        return True
    if target[0] not in PACKAGES:
        return False
    if target[0] not in MAY_IMPORT[package]:
        return True
    # What two agents share belongs into robopref/. An agent may be made of others, but sees no more of their files.
    if package != "agents" or target[0] != package or path.stem in ("__init__", *target[1:2]):
        return False
    return len(target) != 3 or re.fullmatch(r"[A-Z]\w*(Config|Agent)", target[2]) is None


def test_the_reader_of_imports_sees_every_kind_of_import() -> None:
    source = "import a.b\nfrom c import d\nfrom . import e\nfrom ..f import g\ndef h():\n    import_module('i.j')\n"
    assert set(imported_modules(source, "p.q")) == {"a.b", "c.d", "p.q.e", "p.f.g", "i.j"}


@pytest.mark.parametrize(
    ("path", "name", "wrong"),
    [
        ("robopref/losses.py", "envs.make", True),
        ("robopref/losses.py", "robopref.types.Key", False),
        ("robopref/formats/minari.py", "agents.cpl.CPL", True),
        ("envs/metaworld.py", "labelers.teachers.Teacher", True),
        ("labelers/regret.py", "envs.make", True),
        ("labelers/regret.py", "labelers.teachers.Teacher", False),
        ("agents/cpl.py", "agents.bc.BCConfig", False),
        ("agents/cpl.py", "agents.bc.BCAgent", False),
        ("agents/cpl.py", "agents", True),
        ("agents/cpl.py", "agents.bc", True),
        ("agents/cpl.py", "agents.bc.SFT", True),
        ("agents/cpl.py", "agents.bc._BCAgent", True),
        ("agents/cpl.py", "agents.bc.BCConfig.dropout", True),
        ("agents/cpl.py", "agents.cpl.CPL", False),
        ("agents/cpl.py", "experiments.cpl.main", True),
        ("agents/__init__.py", "agents.bc.BC", False),
        ("experiments/cpl.py", "agents.cpl.CPL", False),
        ("experiments/cpl.py", "tests.conftest", True),
    ],
)
def test_the_rule_tells_wrong_imports_from_right_ones(path: str, name: str, wrong: bool) -> None:
    assert forbidden(ROOT / path, name) == wrong


@pytest.mark.parametrize("name", [name for name in NAMES if name != "robopref/cli.py"])
def test_imports_point_the_right_way(name: str) -> None:
    assert [imported for imported in imports_of(ROOT / name) if forbidden(ROOT / name, imported)] == []


def test_the_command_line_imports_the_others_only_inside_functions() -> None:
    tree = ast.parse((ROOT / LIBRARY / "cli.py").read_text(encoding="utf-8"))
    guarded = {id(inner) for node in tree.body if isinstance(node, ast.If) for inner in ast.walk(node)}
    eager = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    eager = [node for node in eager if not is_lazy(node, tree) and id(node) not in guarded]
    names = {name.split(".")[0] for node in eager for name in imported_modules(ast.unparse(node), LIBRARY)}
    assert names <= set(sys.stdlib_module_names)


def test_what_runs_on_the_robot_imports_no_jax() -> None:
    deployment = ROOT / LIBRARY / "deployment"
    waiting = [path for path in MODULES if path.parent == deployment and path.name in RUNS_WITHOUT_JAX]
    seen = set(waiting)
    while waiting:
        module = waiting.pop()
        for imported in imports_of(module):
            assert imported.split(".")[0] not in HEAVY, f"{module.relative_to(ROOT)} imports {imported}"
            parts = imported.split(".")
            stems = [ROOT.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]
            needed = {stem.with_suffix(".py") for stem in stems} | {stem / "__init__.py" for stem in stems}
            waiting += [path for path in MODULES if path in needed - seen]
            seen |= needed


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_every_module_says_what_it_is(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring, f"{path.relative_to(ROOT)} has no docstring"


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {path.parent for path in MODULES} | {ROOT / package for package in PACKAGES}
    assert [str(folder.relative_to(ROOT)) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def needs_a_test(path: Path) -> bool:
    # Packages, programs and experiments only put together what is tested elsewhere, and types.py is the type checker's.
    puts_together = path.name in ("__init__.py", "__main__.py") or path.is_relative_to(ROOT / EXPERIMENTS)
    return not puts_together and path != ROOT / LIBRARY / "types.py"


@pytest.mark.parametrize("name", [name for name in NAMES if needs_a_test(ROOT / name)])
def test_every_module_has_a_mirrored_test(name: str) -> None:
    mirror = Path("tests") / Path(name).parent / f"test_{Path(name).name}"
    assert (ROOT / mirror).is_file(), f"{name} has no {mirror}"


def test_every_mirrored_test_has_its_module() -> None:
    orphans = []
    for package in PACKAGES:
        for test in (ROOT / "tests" / package).rglob("test_*.py"):
            relative = test.relative_to(ROOT / "tests")
            module = ROOT / relative.parent / relative.name.removeprefix("test_")
            if not module.is_file() and not module.with_suffix("").is_dir():
                orphans.append(str(relative))
    # The contract of all environments is one file for many modules.
    assert [name for name in orphans if "contract" not in name] == []


def text_files() -> Iterator[Path]:
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        tracked = UNTRACKED.isdisjoint(parts) and parts[0] not in ("runs", "shared", "robopref.egg-info")
        if tracked and path.suffix in TEXT and path.is_file():
            yield path


def test_nothing_names_a_machine_or_leaves_work_for_later() -> None:
    # Put together here, so that this file does not find itself.
    later = "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3))
    places = "|".join("/" + place for place in ("work/main", "tmp/dev", "root/", "home/[a-z]", "Users/[A-Za-z]"))
    pattern = re.compile(rf"\b(?:{later})\b|(?<![\w.~}}/])(?:{places})")
    found = []
    for path in text_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in pattern.finditer(text)]
    assert found == []


def requirement_lines(name: str) -> list[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("name", REQUIREMENT_FILES)
def test_requirements_are_exact_pins(name: str) -> None:
    pinned = re.compile(r"[A-Za-z0-9._-]+(\[[a-z0-9,_-]+\])?==[0-9][A-Za-z0-9.+!]*")
    others = [line for line in requirement_lines(name) if not pinned.fullmatch(line)]
    assert others == {"requirements.txt": ["-e ."], "requirements-test.txt": ["-r requirements.txt"]}.get(name, [])


def pins(name: str) -> dict[str, str]:
    split = (line.split("==") for line in requirement_lines(name) if "==" in line)
    return {normal(re.sub(r"\[.*\]", "", package)): version for package, version in split}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_editable_install_comes_last() -> None:
    assert requirement_lines("requirements.txt")[-1] == "-e ."


def test_the_constraints_hold_every_pin_unchanged() -> None:
    constraints = pins("constraints.txt")
    for name in REQUIREMENT_FILES[:3]:
        for package, version in pins(name).items():
            assert constraints.get(package) == version, f"{package} in {name}"


def third_party(paths: list[Path]) -> dict[str, str]:
    """Distribution name, to one module that imports it."""
    known = {*sys.stdlib_module_names, *PACKAGES}
    found = {}
    for path in paths:
        for name in imports_of(path):
            top = name.split(".")[0]
            if top not in known and top not in OPTIONAL:
                found[normal(DISTRIBUTIONS.get(top, top))] = str(path.relative_to(ROOT))
    return found


def test_whatever_is_imported_is_pinned() -> None:
    imported, pinned = third_party(MODULES), pins("requirements.txt")
    assert {name: where for name, where in imported.items() if name not in pinned} == {}


def test_the_wheel_declares_what_the_library_imports() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {normal(re.split(r"[\[<>=~! ]", line)[0]) for line in project["dependencies"]}
    imported = third_party([path for path in MODULES if path.is_relative_to(ROOT / LIBRARY)])
    assert {name: where for name, where in imported.items() if name not in declared} == {}
    assert declared <= pins("requirements.txt").keys()


def test_the_wheel_would_hold_the_library_alone() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert setuptools["packages"]["find"]["include"] == ["robopref", "robopref.*"]
