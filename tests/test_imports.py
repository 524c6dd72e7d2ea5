"""Who may import whom, and what never stands where."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from kernels.packages import NEEDED

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "rollout", "trainer", "rl")


def modules(*folders: str) -> Iterator[tuple[Path, ast.Module]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT), ast.parse(path.read_text(), str(path))


def imported(tree: ast.Module) -> set[str]:
    """All modules that `tree` names, at whatever depth: an import inside a function counts."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


def top(tree: ast.Module) -> set[str]:
    return {name.partition(".")[0] for name in imported(tree)}


def test_no_function_of_the_algorithm_is_long() -> None:
    """At most 60 lines: a longer one is more than one thing."""
    found = [
        f"{path}:{node.lineno} {node.name}: {size} lines"
        for path, tree in modules("rl")
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (size := (node.end_lineno or 0) - node.lineno + 1) > 60
    ]
    assert not found, found


def public(nodes: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Functions and classes that others may use, and the methods of these."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            yield from public(node.body) if isinstance(node, ast.ClassDef) else ()


def test_public_docstrings_say_what_the_thing_does() -> None:
    """Their first word is a verb: "Returns ...", "Holds ...", and no noun, preposition or question."""
    found = [
        f"{path}:{node.lineno} {node.name}: {first}"
        for path, tree in modules("kernels", "rollout/server", "trainer", "rl", "recipes")
        for node in public(tree.body)
        if not re.match(r"(?!As\b|This\b)[A-Z]\w*s\b", first := " ".join((ast.get_docstring(node) or "").split()[:3]))
    ]
    assert not found, found


@pytest.mark.parametrize("room", ROOMS)
def test_readmes_draw_their_rooms(room: str) -> None:
    """Every file and folder of a room, and every op, stands in its README."""
    drawn = (ROOT / room / "README.md").read_text()
    places = [*(ROOT / room).iterdir(), *((ROOT / "kernels" / "ops").iterdir() if room == "kernels" else ())]
    names = [p.name for p in places if p.suffix == ".py" or (p / "__init__.py").exists()]
    missing = [name for name in names if not name.startswith("__") and not re.search(rf"\b{re.escape(name)}", drawn)]
    assert not missing, missing


def test_contracts_of_pyproject() -> None:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout and "Contracts: 0" not in done.stdout


@pytest.mark.parametrize(
    ("room", "never"),
    [
        ("kernels", {"rollout", "trainer", "rl", "ray", "hydra", "omegaconf", "pydantic", "wandb", "transformers"}),
        ("rollout", {"trainer", "rl", "hydra", "omegaconf", "pydantic", "wandb"}),
        ("trainer", {"rollout", "rl", "hydra", "omegaconf", "pydantic", "wandb"}),
        ("rl", set()),
    ],
)
def test_directions(room: str, never: set[str]) -> None:
    never = never | {"tests", "recipes", "configs"}
    for path, tree in modules(room):
        here = never
        if path.parts[:2] == ("kernels", "bench"):  # which measures all of it, beside transformers
            here = {"tests", "recipes", "configs"}
        if path.parts[:2] == ("rollout", "server"):  # whose bodies are pydantic's
            here = never - {"pydantic"}
        assert not top(tree) & here, path


def source_of(name: str) -> Path | None:
    path = ROOT / name.replace(".", "/")
    return next((p for p in (path / "__init__.py", path.with_suffix(".py")) if p.exists()), None)


@cache
def defined(path: Path) -> set[str]:
    """Names that a module binds, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    return names


def test_every_import_finds_what_it_names() -> None:
    """Those inside functions too, which a machine without a GPU may never reach."""
    for path, tree in modules(*ROOMS, "recipes", "tests"):
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in (*ROOMS, "tests"):
                module = source_of(str(node.module))
                assert module, f"{path}:{node.lineno}: no module {node.module}"
                for alias in node.names:
                    found = alias.name in defined(module) or source_of(f"{node.module}.{alias.name}")
                    assert found, f"{path}:{node.lineno}: {node.module} has no {alias.name}"


def test_ray_stays_in_the_actors() -> None:
    for path, tree in modules("rollout", "trainer"):
        if path.name != "actor.py":
            assert "ray" not in top(tree), path


def test_rollout_computes_nothing() -> None:
    """What decides bits is in kernels/: here no module of weights, no product, no gradient."""
    for path, tree in modules("rollout"):
        names = imported(tree)
        assert not {n for n in names if n.startswith(("torch.nn", "torch.autograd"))}, path
        for node in ast.walk(tree):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ClassDef):
                assert not any(ast.unparse(base).endswith("Module") for base in node.bases), where
            if isinstance(node, ast.BinOp):
                assert not isinstance(node.op, ast.MatMult), where
            if isinstance(node, ast.Attribute):
                never = {
                    "matmul",
                    "mm",
                    "bmm",
                    "einsum",
                    "softmax",
                    "log_softmax",
                    "backward",
                    "requires_grad_",
                    "grad",
                }
                assert node.attr not in never, where
                assert ast.unparse(node) not in ("torch.nn", "nn.functional", "torch.autograd"), where
            if isinstance(node, ast.keyword):
                assert node.arg != "requires_grad", where


@pytest.mark.parametrize(
    "module", ["rl.train", "rl.evaluate", "rl.data.__main__", "rollout.actor", "rl.rewards.worker"]
)
def test_what_starts_no_trainer_rank_imports_no_fsdp2(module: str) -> None:
    """It takes over a second of every command and of every rollout rank; a run imports it while Ray starts."""
    told = f"import sys, {module}; print(sorted({{'torch.distributed.tensor', 'sympy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", told], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", (done.stdout, done.stderr)


def test_no_code_among_the_data() -> None:
    """An experiment of several commands is a folder of its own in recipes/, which nothing imports."""
    for files in ((ROOT / "configs").rglob("*"), (ROOT / "recipes").glob("*")):
        kinds = {p.suffix for p in files if p.is_file() and "__pycache__" not in p.parts}
        assert kinds and kinds <= {".yaml", ".md"}, kinds
    for path, tree in modules(*ROOMS):
        assert "recipes" not in top(tree), path


def test_names_that_say_nothing() -> None:
    for path, _ in modules(*ROOMS):
        assert not {"utils", "util", "common", "helpers", "misc"} & {path.stem, *path.parts}, path


def test_no_numeric_test_is_run_again() -> None:
    for path, tree in modules("tests"):
        assert not {"flaky", "pytest_rerunfailures"} & top(tree), path


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("rl.train", ["torch"]),
        ("rl.train", ["ray", "hydra"]),
        ("rl.data", ["math_verify"]),
        ("rl.runs", ["torch"]),
        ("rollout.serve", ["torch"]),
        ("trainer.export", ["safetensors"]),
        ("kernels.bench", ["torch"]),
    ],
)
def test_a_package_that_is_missing_is_one_line(command: str, missing: list[str]) -> None:
    code = f"import runpy, sys; sys.modules |= dict.fromkeys({missing}); runpy.run_module({command!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == "", done
    (line,) = done.stderr.splitlines()
    assert line.startswith("samebit: error: ") and "not installed: pip install -e " in line
    assert all(name.partition("_")[0] in line for name in missing)


def test_what_is_needed_is_what_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {
        re.split(r"[\[<>=~! ]", one)[0].removesuffix("-core").replace("-", "_") for one in project["dependencies"]
    }
    assert set(NEEDED["rl"]) == declared
    assert all(set(names) <= declared for names in NEEDED.values())
