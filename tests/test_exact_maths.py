"""Nothing that decides a bit comes from a library that rounds as the CPU, or its version, makes it."""

import ast
from pathlib import Path

import pytest

from kernels.cpu import build
from tests.exact_maths import ALLOWED, refused, refused_in_c

ROOT = Path(__file__).resolve().parents[1]
FILES = [
    path
    for pattern in (
        *(
            f"{room}/**/*.py"
            for room in (
                *("rl", "trainer", "rollout"),
                *(f"kernels/{room}" for room in ("model", "weights", "collectives", "cpu")),
            )
        ),
        *(f"kernels/ops/**/{name}.py" for name in ("__init__", "cpu")),
        *(f"kernels/{name}.py" for name in ("device", "scalars", "tree")),
    )
    for path in sorted(ROOT.glob(pattern))
    if not path.name.startswith("bench")
    and not path.parent.name.startswith("bench")  # these time, and compare with others
]
C_FILES = sorted(path for suffix in "ch" for path in (ROOT / "kernels").glob(f"**/*.{suffix}"))


def found() -> dict[str, int]:
    """Each use as ALLOWED has it, and its first line."""
    uses: dict[str, int] = {}
    for path in FILES:
        for use in refused(ast.parse(path.read_text())):
            uses.setdefault(f"{path.relative_to(ROOT)} {use.function} {use.name}", use.line)
    return uses


def test_every_use_is_allowed_for_a_reason() -> None:
    allowed = {use for uses in ALLOWED.values() for use in uses}
    strange = [f"{use}, line {line}" for use, line in found().items() if use not in allowed]
    assert not strange, "\n".join(
        (
            "these round as a library likes: use kernels.ops, kernels.scalars or math.fsum, or say in ALLOWED why not",
            *strange,
        )
    )
    assert len(FILES) > 100


def test_no_reason_without_a_use() -> None:
    uses, there = [use for uses in ALLOWED.values() for use in uses], found()
    assert not [use for use in uses if use not in there or uses.count(use) > 1]


@pytest.mark.parametrize("path", C_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_c_calls_nothing_of_libm_but_what_ieee_754_rounds(path: Path) -> None:
    assert not refused_in_c(path.read_text())


def test_the_compiler_may_not_change_the_arithmetic() -> None:
    assert "-ffp-contract=off" in build._FLAGS
    assert not [flag for flag in build._FLAGS if "fast" in flag or "unsafe" in flag or "associative" in flag]


# The lint itself ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("y = torch.exp(x)", "torch.exp"),
        ("y = x.sqrt()", ".sqrt"),
        ("x.exp_()", ".exp_"),
        ("y = map(math.exp, x)", "math.exp"),
        ("y = np.linalg.norm(x)", "linalg.norm"),
        ("y = x.sum(1)", ".sum"),
        ("y = x.float().mean()", ".mean"),
        ("y = sum(x)", "sum"),
        ("y = pow(x, 2)", "pow"),
        ("y = x ** -0.5", "**"),
        ("y = 2 ** n", "**"),
        ("y **= 2", "**"),
        ("y = a @ b", "@"),
        ("from math import log2", "math.log2"),
        ("from torch.nn.functional import softmax", "torch.nn.functional.softmax"),
        ("y = torch.nn.functional.gelu(x)", "functional.gelu"),
        ("import scipy.special", "import scipy.special"),
        ("from random import shuffle", "random.shuffle"),
        ("y = np.random.default_rng(0)", "random.default_rng"),
        ("x.normal_()", ".normal_"),
        ("torch.set_flush_denormal(True)", "torch.set_flush_denormal"),
    ],
)
def test_what_is_refused(code: str, name: str) -> None:
    assert [use.name for use in refused(ast.parse(code))] == [name]


def test_what_is_not() -> None:
    code = """
y = math.sqrt(1 / D) + math.fsum(x) + 2**20 * math.prod(shape)
self.log(metrics); state.log; log.step(1); x.float().to(torch.bfloat16); x * y / 3; torch.nn.functional.pad(x, (0, 1))
"""
    assert not list(refused(ast.parse(code)))


def test_a_use_is_named_by_its_outermost_function() -> None:
    code = "class A:\n    def f(self):\n        def g(x):\n            return x.sum()\n        return [t.exp() for t in g]\n"
    assert [(use.function, use.name, use.line) for use in refused(ast.parse(code))] == [
        ("A.f", ".sum", 4),
        ("A.f", ".exp", 5),
    ]


def test_what_is_refused_in_c() -> None:
    assert refused_in_c("y = expf(x); /* expf(x) */ z = fmaf(a, b, c) + sqrtf(x) + exp_f32(x);") == ["expf"]
    assert refused_in_c("#pragma omp parallel for reduction(+ : s)") == ["reduction("]
