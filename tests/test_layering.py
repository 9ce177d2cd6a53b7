"""Who may import whom, what may be named where. Read off the syntax trees, so nothing is run."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedpeft
from fedpeft.defaults import DEFAULTS
from fedpeft.plan import PARTS
from fedpeft.spec import build, names

ROOT = Path(fedpeft.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
FAMILIES = sorted(set(PARTS.values()) | {"presets"})
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "datasets",
    "flwr",
    "mlflow",
    "opacus",
    "optuna",
    "ray",
    "tensorboard",
    "wandb",
}
LIGHT = [
    *("types", "errors", "spec", "fields", "plan", "federation", "tensors", "rng", "wire"),
    *(
        "memory",
        "tables",
        "state",
        "broadcasts",
        "rounds",
        "client_rounds",
        "client_training",
        "durable",
        "preview",
    ),
    *(
        "directions",
        "mirror",
        "residuals",
        "events",
        "attendance",
        "diagnostics",
        "releases",
        "conversion",
        "scattered",
        "yaml_file",
    ),
]
"""Modules, beside those of the families, that whoever only reads plans and packets needs."""
SHARED = {
    *("types", "errors", "spec", "fields", "grouping", "tensors", "rng"),
    *("stacking", "per_example", "lowrank"),
}
"""Modules that methods may use: the vocabulary, and tools that need nothing but the vocabulary."""


def _files(name: str) -> list[Path]:
    """Return the file of a module, or those of a folder."""
    file = ROOT / f"{name}.py"
    return [file] if file.exists() else sorted((ROOT / name).glob("*.py"))


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        found = node.module or ""
        return [found, *(f"{found}.{alias.name}" for alias in node.names)]
    return []


def _imports(path: Path) -> set[str]:
    """Every module that is imported anywhere in the file."""
    return {name for node in ast.walk(_tree(path)) for name in _imported(node)}


def _imports_at_once(path: Path) -> set[str]:
    """What importing the file imports: not inside functions, not for type checkers only."""

    def walk(nodes: list[ast.stmt]) -> Iterator[str]:
        for node in nodes:
            yield from _imported(node)
            if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
                yield from walk([*node.body, *node.orelse])
            elif isinstance(node, ast.Try | ast.With | ast.ClassDef):
                yield from walk(node.body)

    return set(walk(_tree(path).body))


def _layers(modules: set[str]) -> set[str]:
    """Return the package's own modules and folders among these."""
    return {module.split(".")[1] for module in modules if module.startswith("fedpeft.")}


def _roots(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_the_library_never_imports_what_is_built_on_it(path: Path) -> None:
    assert not _roots(_imports(path)) & {"client", "server", "simulations", "tests"}
    relative = [n for n in ast.walk(_tree(path)) if isinstance(n, ast.ImportFrom) and n.level]
    assert not relative, "write imports out in full"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_only_the_flower_modules_import_flwr(path: Path) -> None:
    if path.parent != ROOT / "flower":
        allowed = {"ray"} if path == ROOT / "engine" / "_cluster.py" else set()
        assert _roots(_imports(path)) & {"flwr", "ray"} <= allowed


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_the_library_raises_errors_and_asserts_nothing(path: Path) -> None:
    assert not [node.lineno for node in ast.walk(_tree(path)) if isinstance(node, ast.Assert)]


@pytest.mark.parametrize(
    "path",
    [
        *(path for name in LIGHT for path in _files(name)),
        *(p for family in FAMILIES for p in sorted((ROOT / family).glob("[!_]*.py"))),
        *(p for p in sorted((ROOT / "codecs").glob("_*.py"))),
    ],
    ids=_name,
)
def test_what_a_plan_needs_imports_nothing_heavy_at_once(path: Path) -> None:
    assert not _roots(_imports_at_once(path)) & HEAVY


@pytest.mark.parametrize(
    "path", [p for f in FAMILIES for p in sorted((ROOT / f).glob("*.py"))], ids=_name
)
def test_methods_know_the_vocabulary_and_no_other_layer(path: Path) -> None:
    used = _layers(_imports(path)) - SHARED - {"data", "models", path.parent.name}
    assert not used, f"{sorted(used)} belong to other layers or families"


@pytest.mark.parametrize("module", sorted(SHARED))
def test_what_methods_share_knows_no_layer_above_it(module: str) -> None:
    assert _files(module)
    for path in _files(module):
        assert _layers(_imports_at_once(path)) <= SHARED


def test_building_a_plan_imports_nothing_heavy() -> None:
    program = """
import sys
import fedpeft.plan
from fedpeft import Plan

for adapter in ("lora", "full"):
    Plan.from_lines({
        "model": "tiny-novels", "task": "classify", "data": "embedded(name='support')",
        "adapter": adapter, "trainer": "plain(optimizer='sgd')", "correction": "scaffold",
        "uplink": "raw | half", "optimizer": "adam", "cohort": "poisson", "rounds": 1,
        "partition": "dirichlet", "clients": 2,
    }).lines()
Plan.from_lines({
    "model": "tiny-novels", "task": "causal_lm", "data": "hub(name='a/b')", "preset": "fedit",
    "rounds": 1, "partition": "by_field",
})
print(*sorted(name for name in sys.modules if "." not in name))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    loaded = set(done.stdout.split())
    assert "fedpeft" in loaded
    assert not loaded & HEAVY


def _methods() -> set[tuple[str, str]]:
    """Names of all methods, and of their classes."""
    found = set()
    for family in FAMILIES:
        for name in names(family):
            tree = _tree(ROOT / family / f"{name}.py")
            letters = name.replace("_", "")
            classes = [n.name for n in tree.body if isinstance(n, ast.ClassDef)]
            own = next(c for c in classes if c.replace("_", "").lower() == letters)
            found.add((name, own))
    return found


def _strings(tree: ast.AST) -> Iterator[ast.Constant]:
    """Yield string constants that are not docstrings."""
    texts = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            yield node


@pytest.mark.parametrize("module", ["plan", "rounds"])
def test_the_spine_knows_no_method_by_name(module: str) -> None:
    """No string is a method's name and no identifier is its class.

    Only ``none`` is no knowledge of a method: it is the plan's word for nothing.
    """
    tree = _tree(ROOT / f"{module}.py")
    methods = _methods()
    texts = [str(node.value) for node in _strings(tree)]
    spoken = {*texts, *(word for text in texts for word in re.findall(r"(\w+)\(", text))}
    assert spoken & {name for name, _ in methods} <= {"none"}
    identifiers = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    identifiers |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    identifiers |= {name.rpartition(".")[2] for name in _imports(ROOT / f"{module}.py")}
    assert not identifiers & {cls for _, cls in methods}
    modules = {f"fedpeft.{f}" for f in FAMILIES}
    assert not {m for m in _imports(ROOT / f"{module}.py") if m.rpartition(".")[0] in modules}


def test_the_defaults_of_a_plan_are_methods() -> None:
    assert set(DEFAULTS) == set(PARTS) - {"task", "data"}
    for line, default in DEFAULTS.items():
        build(PARTS[line], default)


def test_the_package_exports_four_names() -> None:
    assert sorted(fedpeft.__all__) == ["FedPeftError", "Plan", "Result", "simulate"]
    for name in fedpeft.__all__:
        assert getattr(fedpeft, name).__module__.startswith("fedpeft.")
    tree = _tree(ROOT / "__init__.py")
    used = {n for node in ast.walk(tree) for n in _imported(node) if n.startswith("fedpeft.")}
    exported = {name.rpartition(".")[2] for name in used}
    assert exported <= {*fedpeft.__all__, "errors", "plan", "driver"}
    with pytest.raises(AttributeError, match="no attribute 'simulat'"):
        _ = fedpeft.simulat
