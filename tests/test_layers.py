"""Imports point only downwards, and each of some torch functions has one file that may use it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "torchbilevel"

ORDER = (
    "__init__",
    "trace",
    "methods",
    "method",
    "pairing",
    "constraint",
    "facade",
    "verify",
    "certificate",
    "verdict",
    "constants",
    "self_check",
    "estimators",
    "curvature",
    "response",
    "lagrangian",
    "lower",
    "linear_solve",
    "problem",
    "checks",
    "copies",
    "modules",
    "tasks",
    "oracle",
    "derivatives",
    "counts",
    "draws",
    "sources",
    "samples",
    "decay",
    "projections",
    "lanczos",
    "blocks",
    "ranks",
    "tensors",
    "shards",
)
BELOW = {layer: set(ORDER[i + 1 :]) for i, layer in enumerate(ORDER)}
for _layer in ("__init__", "methods", "method", "verify"):
    BELOW[_layer].add("optim")
BELOW["optim"] = {"lanczos", "tensors", "shards"}

OWNER = {"functional_call": "tasks", "autograd.grad": "derivatives", "_engine_run_backward": "derivatives"}


def imports_of(tree: ast.Module, path: str) -> list[tuple[str, str, int]]:
    """List (local name, absolute dotted name, line) of all imports, those inside functions included."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(a.asname or a.name, a.name, node.lineno) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = path.split("/")[: -node.level] if node.level else []
            base = ".".join([*parts, node.module] if node.module else parts)
            found += [(a.asname or a.name, f"{base}.{a.name}", node.lineno) for a in node.names]
    return found


def layer_of(name: str) -> str:
    """Layer of a dotted name: ``optim`` of ``torchbilevel.optim.neon``, ``__init__`` of ``torchbilevel``."""
    return [*name.split("."), "__init__"][1]


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """Absolute dotted name of ``a.b.c``, given what the imported local names stand for."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def violations(source: str, path: str) -> list[str]:
    """One line for each violation in a file; ``path`` is as in ``torchbilevel/optim/neon.py``."""
    tree = ast.parse(source)
    layer = path.split("/")[1].removesuffix(".py")
    if layer not in BELOW:
        return [f"{path}: has no place in the layout (ORDER in tests/test_layers.py)"]
    imports, found = imports_of(tree, path), []
    for _, name, line in imports:
        top = name.split(".")[0]
        if top == "torchbilevel" and layer_of(name) not in {layer, *BELOW[layer]}:
            found.append(f"{path}:{line}: {layer} must not import {layer_of(name)}")
        if layer == "optim" and top not in {"torchbilevel", "torch", *sys.stdlib_module_names}:
            found.append(f"{path}:{line}: optim must not import {top}")
    names = {local: name for local, name, _ in imports}
    uses = {(name, line) for _, name, line in imports}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            uses.add((dotted(node, names), node.lineno))
    for what, owner in OWNER.items():
        lines = sorted({line for name, line in uses if f".{name}".endswith(f".{what}")})
        found += [f"{path}:{line}: only {owner} may use {what}" for line in lines if layer != owner]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_downwards(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    assert violations(source, file.relative_to(PACKAGE.parent).as_posix()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("tensors.py", "from torchbilevel.problem import BilevelProblem"),
        ("tensors.py", "from .problem import BilevelProblem"),
        ("lower.py", "def f():\n    from torchbilevel import curvature"),
        ("lower.py", "import torchbilevel as tb"),
        ("lower.py", "from . import certify"),
        ("lower.py", "from torchbilevel.optim import PerturbedGD"),
        ("method.py", "import torchbilevel.methods.plain"),
        ("estimators/base.py", "from ..optim.neon import NEON"),
        ("optim/neon.py", "from ..estimators import Implicit"),
        ("optim/neon.py", "from torchbilevel.derivatives import gradient"),
        ("optim/neon.py", "import numpy as np"),
        ("stray.py", ""),
        ("problem/base.py", "from torch.func import functional_call"),
        ("samples.py", "import torch\ntorch.func.functional_call(m, p, a)"),
        ("problem.py", "import torch\ntorch.autograd.grad(f, x)"),
        ("problem.py", "from torch import autograd as ag\nag.grad(f, x)"),
        ("problem.py", "from torch.autograd import grad"),
    ],
)
def test_planted_violation_is_caught(path: str, source: str) -> None:
    assert len(violations(source, f"torchbilevel/{path}")) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("__init__.py", "from . import optim\nfrom .methods import MRBO\nfrom .tensors import dot"),
        ("methods/plain.py", "from torchbilevel.optim import NEON\nfrom .escaping import PerturbedAID"),
        ("method.py", "from torchbilevel import optim\nfrom torchbilevel.estimators.base import Estimator"),
        ("estimators/implicit.py", "from . import base\nfrom .base import Estimator\nfrom ..lower import GD"),
        ("optim/neon.py", "import math\nimport torch\nfrom .base import Rule\nfrom ..tensors import dot"),
        ("tasks.py", "from torch.func import functional_call, grad\nfunctional_call(m, p, a)"),
        ("derivatives.py", "import torch\ntorch.autograd.grad(f, x)"),
        ("lower.py", "parameter.grad = None"),
    ],
)
def test_permitted_source_passes(path: str, source: str) -> None:
    assert violations(source, f"torchbilevel/{path}") == []
