"""The repository itself: who imports whom, lint, types, import cost, docstring examples, packaging."""

import ast
import doctest
import importlib
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest

import metaprune

ROOT = Path(__file__).resolve().parents[1]
FOLDERS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]

# Lowest layer first: a module imports its own layer and those below it.  The first pattern that fits counts.
LAYERS = (
    ("metaprune.graphs", "metaprune.graphs.*"),
    (
        "metaprune.task",
        "metaprune.data",
        "metaprune.dataless",
        "metaprune.datasets",
        "metaprune.losses",
        "metaprune.training",
        "metaprune.evaluation",
        "metaprune.initialise",
        "metaprune.mfac",
        "metaprune.criteria*",
        "metaprune.calibration",
        "metaprune.statistics*",
        "metaprune.ridge",
        "metaprune.reconstruction",
        "metaprune.recovery*",
        "metaprune.curvature",
        "metaprune.removal",
        "metaprune.brain_surgeon",
        "metaprune.compensation",
        "metaprune.features",
        "metaprune.imitation",
        "metaprune.curves",
        "metaprune.distances",
        "metaprune.masking",
        "metaprune.monotone",
        "metaprune.quadratic",
        "metaprune.refits",
        "metaprune.tables",
        "metaprune.rate_distortion",
        "metaprune.trials",
        "metaprune.judge",
        "metaprune.timing",
        "metaprune.engines",
        "metaprune.latency*",
    ),
    ("metaprune.search", "metaprune.search.*"),
    ("metaprune", "metaprune.*"),
)

# Third-party package -> modules that may import it.  "lazy" means inside a function only.
ANYWHERE = ("metaprune*",)
EAGER = {
    "torch": ANYWHERE,
    "numpy": ANYWHERE,
    "safetensors": ANYWHERE,
    "networkx": ("metaprune.graphs*",),
    "scipy": ("metaprune.search.*",),
    "pymoo": ("metaprune.search.*",),
    "moocore": ("metaprune.search.*",),
    "optuna": ("metaprune.search.*", "metaprune.jobs"),
    "torch_geometric": ("metaprune.metanet*",),
    "typer": ("metaprune.cli*",),
    "rich": ("metaprune.cli*", "metaprune.demo"),
}
LAZY = {
    "networkx": ANYWHERE,
    "sklearn": ("metaprune.datasets",),
    "scipy": ("metaprune.probes.fidelity", "metaprune.latency_fit"),
    "onnx": ("metaprune.graphs.*onnx*",),
    "onnx_ir": ("metaprune.graphs.*onnx*",),
    "onnxscript": ("metaprune.graphs.*onnx*",),
    "onnxruntime": ("metaprune.graphs.*onnx*", "metaprune.evaluation", "metaprune.engines"),
    "matplotlib": ("metaprune.search.plots",),
}
HEAVY = ("torch_geometric", "pymoo", "optuna", "scipy", "onnx", "onnxruntime", "sklearn", "matplotlib", "typer", "rich")


class Import(NamedTuple):
    target: str
    lazy: bool
    level: int
    line: int


def module_name(path: Path) -> str:
    """Import name of a source file under one of the mapped folders."""
    folder = path.relative_to(ROOT).parts[0]
    package = next(name for name, where in FOLDERS.items() if where == folder)
    parts = path.relative_to(ROOT / folder).with_suffix("").parts
    return ".".join([package, *(part for part in parts if part != "__init__")])


def imports(tree: ast.AST, lazy: bool = False) -> Iterator[Import]:
    """Every import that runs; those under `if TYPE_CHECKING:` bind names for the type checker only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in node.orelse:
                yield from imports(ast.Module([other], []), lazy)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, lazy, 0, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            yield Import(node.module or "", lazy, node.level, node.lineno)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(node, lazy or inside)


def fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def layer(name: str) -> int:
    return next(rank for rank, patterns in enumerate(LAYERS) if fits(name, patterns))


SOURCES = {module_name(p): p for folder in FOLDERS.values() for p in sorted((ROOT / folder).rglob("*.py"))}
PROGRAMS = sorted(p for folder in ("examples", "benchmarks") for p in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("name", SOURCES)
def test_imports_respect_the_layers(name: str) -> None:
    for target, lazy, level, line in imports(ast.parse(SOURCES[name].read_text())):
        where = f"{name}:{line} imports {target}"
        assert level == 0, f"{where}: relative import"
        package = target.split(".")[0]
        if package == "metaprune":
            assert layer(target) <= layer(name), f"{where}: a higher layer"
        elif package not in sys.stdlib_module_names:
            assert package in {*EAGER, *LAZY}, f"{where}: unknown package, give it a row above"
            allowed = EAGER.get(package, ()) + (LAZY.get(package, ()) if lazy else ())
            assert fits(name, allowed), f"{where}: not here" + ("" if lazy else ", or not at module level")


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: str(p.relative_to(ROOT)))
def test_programs_use_the_public_api_only(path: Path) -> None:
    for target, _, level, line in imports(ast.parse(path.read_text())):
        assert level == 0, f"{path.name}:{line}: relative import"
        assert target == "metaprune" or not target.startswith("metaprune."), f"{path.name}:{line} imports {target}"


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("from metaprune.search.space import Space", "a higher layer"),
        ("from metaprune import prune", "a higher layer"),
        ("from .ir import Graph", "relative import"),
        ("import scipy.optimize", "not here"),
        ("import onnx", "not at module level"),
        ("import flask", "unknown package"),
        ("from graphs.ir import Graph", "unknown package"),
    ],
)
def test_the_layer_check_sees_violations(
    source: str, rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "made_up.py"
    path.write_text(source)
    monkeypatch.setitem(SOURCES, "metaprune.graphs.made_up_onnx", path)
    with pytest.raises(AssertionError, match=rule):
        test_imports_respect_the_layers("metaprune.graphs.made_up_onnx")


def test_every_lazy_import_in_a_function_is_marked_lazy() -> None:
    source = "import a\ndef f():\n    import b\nclass C:\n    import c\n    def g(self):\n        import d\n"
    found = {item.target: item.lazy for item in imports(ast.parse(source))}
    assert found == {"a": False, "b": True, "c": False, "d": True}


def test_lint() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--output-format=concise", "."],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def type_check(view: Path) -> subprocess.CompletedProcess[str]:
    """Run mypy on the package laid out as it is installed, under `view`."""
    inside = view / "metaprune"
    inside.mkdir()
    for child in (ROOT / "metaprune").iterdir():
        (inside / child.name).symlink_to(child)
    for package, folder in FOLDERS.items():
        if package != "metaprune":
            (inside / package.split(".")[1]).symlink_to(ROOT / folder)
    # A fresh cache: one kept between views at different places reports attributes that exist as missing.
    config = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(view / "cache")]
    return subprocess.run(
        [sys.executable, "-m", "mypy", *config, "-p", "metaprune"], cwd=view, capture_output=True, text=True
    )


def test_types(tmp_path: Path) -> None:
    done = type_check(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def run_python(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("code", ["import metaprune", "from metaprune import *", "import metaprune.graphs"])
def test_importing_is_cheap(code: str, tmp_path: Path) -> None:
    out = run_python(f"{code}\nimport sys\nfor name in {HEAVY}:\n    if name in sys.modules: print(name)", tmp_path)
    assert out.split() == []


def test_the_mapped_folders_are_not_installed_as_top_level_modules(tmp_path: Path) -> None:
    code = "import importlib.util as u\nfor name in ('graphs', 'search', 'checkpoints'): print(u.find_spec(name))"
    assert run_python(code, tmp_path).split() == ["None", "None", "None"]


def test_the_wheel_holds_the_mapped_folders_and_nothing_else(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    # The build back end itself: no network, no isolation.
    code = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    wheel = run_python(code, tmp_path).split()[-1]
    files = zipfile.ZipFile(tmp_path / "dist" / wheel).namelist()
    modules = {name for name in files if name.endswith(".py")}
    expected = {
        "/".join([*package.split("."), *path.relative_to(ROOT / folder).parts])
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert modules == expected
    assert "metaprune/py.typed" in files
    shipped = {path.name for path in (ROOT / "checkpoints").iterdir() if path.suffix in (".safetensors", ".json")}
    assert {f"metaprune/checkpoints/{name}" for name in shipped} <= set(files)


@pytest.mark.parametrize("name", metaprune.__all__)
def test_public_names(name: str) -> None:
    value = getattr(metaprune, name)
    assert name not in ("graphs", "search")
    assert f"metaprune.{name}" not in SOURCES, "a module must not carry the name of a public function"
    if callable(value):
        assert value.__name__ == name
        assert value.__doc__


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        metaprune.no_such_name  # noqa: B018


@pytest.mark.parametrize("name", [name for name, path in SOURCES.items() if ">>>" in path.read_text()])
def test_docstring_examples(name: str) -> None:
    # By the real name: --doctest-modules would import graphs/x.py a second time, as graphs.x.
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
