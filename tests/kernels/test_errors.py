"""What an op refuses, and that the message names the numbers that do not fit."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels import ops
from kernels.cpu import call
from kernels.device import UnsupportedError, implementation, same_device
from kernels.ops.attention.spec import packed
from kernels.ops.matmul import weight_gradient
from kernels.spec import OpSpec, SpecError, all_specs
from kernels.tree import TreeError

CPU = torch.device("cpu")


def x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(*shape, dtype=dtype)


def w(*shape: int) -> torch.Tensor:
    return x(*shape).requires_grad_()


def upto(*offsets: int) -> torch.Tensor:
    return torch.tensor(offsets)


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return ops.attention(q, keys, values, packed(torch.tensor([q.shape[0]]), CPU), 1.0)


def turn(heads: torch.Tensor, half: int) -> object:
    """Rope alone, of a table of four positions."""
    positions = torch.arange(len(heads), dtype=torch.int32)
    return ops.norm_rope(heads, None, 0.0, (x(4, half), x(4, half)), positions, 1)


def decode_gradient() -> None:
    """Two queries against a cache of six keys."""
    pages = packed(torch.tensor([6]), CPU)
    pages = type(pages)(pages.table, 1, pages.sequence[4:], pages.position[4:], torch.tensor([0, 2]))
    ops.attention(w(2, 1, 16), x(6, 1, 16), x(6, 1, 16), pages, 1.0).sum().backward()


def strided(n: int) -> torch.Tensor:
    return x(n, 2)[:, 0]


B16 = torch.bfloat16
Attempt = tuple[str, Callable[[], object], tuple[str, ...]]
REFUSED: list[Attempt] = [
    ("matmul: K", lambda: ops.matmul(x(2, 8), x(3, 9), 1), ("(2, 8)", "(3, 9)")),
    ("matmul: dimensions", lambda: ops.matmul(x(8), x(3, 8), 1), ("(8,)", "(3, 8)")),
    ("matmul: dtypes", lambda: ops.matmul(x(2, 8), x(3, 8, dtype=B16), 1), ("float32", "bfloat16")),
    ("matmul: float64", lambda: ops.matmul(x(2, 8).double(), x(3, 8).double(), 1), ("float64",)),
    ("matmul: no groups", lambda: ops.matmul(x(2, 8), w(3, 8), 1), ("groups",)),
    ("matmul: groups end", lambda: weight_gradient(x(5, 3), x(5, 4), upto(0, 2, 4)), ("4", "5")),
    ("matmul: devices", lambda: ops.matmul(x(2, 8), x(3, 8).to("meta"), 1), ("cpu", "meta")),
    ("attention: heads", lambda: attend(x(4, 3, 16), x(4, 2, 16), x(4, 2, 16)), ("(4, 3, 16)", "(4, 2, 16)")),
    ("attention: values", lambda: attend(x(4, 2, 16), x(4, 2, 16), x(5, 2, 16)), ("(5, 2, 16)",)),
    ("attention: keys", lambda: attend(x(4, 2, 16), x(4, 2, 32), x(4, 2, 32)), ("(4, 2, 32)",)),
    ("attention: head_dim 24", lambda: attend(x(4, 2, 24), x(4, 2, 24), x(4, 2, 24)), ("24", "16")),
    ("attention: head_dim 528", lambda: attend(x(4, 1, 528), x(4, 1, 528), x(4, 1, 528)), ("528", "512")),
    ("attention: gradient of a cache", decode_gradient, ("identity page table",)),
    ("embedding: ids", lambda: ops.embedding(ids(0).view(1, 1), x(3, 2)), ("(1, 1)", "(3, 2)")),
    ("embedding: no groups", lambda: ops.embedding(ids(0), w(3, 2)), ("groups",)),
    (
        "embedding: gradient of a shard",
        lambda: ops.embedding(ids(1, 5), w(3, 2), groups=upto(0, 2)).sum().backward(),
        ("shard",),
    ),
    ("vocab_nodes: leaves", lambda: ops.vocab_nodes(x(2, 10), x(2), 4), ("10", "4 leaves")),
    ("linear_logprob: leaves", lambda: ops.linear_logprob(x(2, 8), x(6, 8), ids(0, 1), x(2), 4), ("6", "4 leaves")),
    ("sum_rows: groups end", lambda: ops.sum_rows(x(5, 3), upto(0, 6)), ("5", "6")),
    ("sum_rows: dtype", lambda: ops.sum_rows(x(5, 3, dtype=B16), upto(0, 5)), ("bfloat16",)),
    ("rms_norm: weight", lambda: ops.rms_norm(x(2, 8), x(7), 1e-6), ("8", "7")),
    ("rms_norm: no groups", lambda: ops.rms_norm(x(2, 8), w(8), 1e-6), ("groups",)),
    ("norm_rope: head_dim", lambda: turn(x(2, 2, 8), 3), ("(2, 2, 8)", "6")),
    ("norm_rope: dimensions", lambda: turn(x(2, 8), 4), ("(2, 8)",)),
    ("norm_rope: heads", lambda: turn(x(2, 1, 8), 4), ("(2, 1, 8)", "1 key heads")),
    ("norm_rope: positions", lambda: turn(x(9, 2, 8), 4), ("8", "table of 4")),
    ("swiglu: odd", lambda: ops.swiglu(x(2, 7)), ("(2, 7)",)),
    ("swiglu: dimensions", lambda: ops.swiglu(x(8)), ("(8,)",)),
    ("sample: shard", lambda: ops.gumbel_argmax(x(1, 4), x(1), ids(0), ids(0), ids(0).byte(), 6), ("6", "4")),
    ("a strided argument", lambda: call("square_rows", strided(5), x(5), 5, 1), ("square_rows", "(5,)")),
    ("an argument elsewhere", lambda: call("square_rows", x(5, 1).to("meta"), x(5), 5, 1), ("meta",)),
    (
        "a device without an implementation",
        lambda: implementation("matmul", torch.device("meta")),
        ("matmul", "meta", "cpu"),
    ),
    ("tensors apart", lambda: same_device("exp", x(1), x(1).to("meta")), ("exp", "cpu", "meta")),
]
OFF_THE_TREE: list[Attempt] = [
    ("matmul: leaves of K", lambda: ops.matmul(x(2, 10), x(3, 10), 4), ("10", "4 leaves")),
    ("matmul: three leaves", lambda: ops.matmul(x(2, 12), x(3, 12), 3), ("3 leaves",)),
    ("matmul: leaves of N", lambda: ops.matmul(w(2, 8), x(6, 8), 4).sum().backward(), ("6", "4 leaves")),
]


def refuse(attempt: Callable[[], object], error: type[Exception], named: tuple[str, ...]) -> None:
    with pytest.raises(error) as raised:
        attempt()
    for number in named:
        assert number in str(raised.value), f"{raised.value!s} does not name {number}"


@pytest.mark.parametrize(("attempt", "named"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_unsupported(attempt: Callable[[], object], named: tuple[str, ...]) -> None:
    refuse(attempt, UnsupportedError, named)


@pytest.mark.parametrize(
    ("attempt", "named"), [case[1:] for case in OFF_THE_TREE], ids=[case[0] for case in OFF_THE_TREE]
)
def test_off_the_tree(attempt: Callable[[], object], named: tuple[str, ...]) -> None:
    refuse(attempt, TreeError, named)


@pytest.mark.parametrize("spec", all_specs(), ids=lambda s: s.name)
def test_inputs_that_must_be_contiguous_are_refused_and_never_misread(spec: OpSpec) -> None:
    inputs = spec.make(spec.cases[1], torch.Generator().manual_seed(0), CPU, spec.dtypes[0])
    expected = spec.outputs(inputs)
    for name in spec.contiguous:
        if name in inputs:
            laid = torch.stack([inputs[name]] * 2, -1)[..., 0]
            try:
                outputs = spec.outputs({**inputs, name: laid})
            except UnsupportedError as error:
                assert "contiguous" in str(error)
            else:
                assert all(torch.equal(a, e) for a, e in zip(outputs, expected, strict=True)), f"{name} was misread"


# Specs ----------------------------------------------------------------------------------------------------------------


def test_an_op_without_a_spec_cannot_exist(tmp_path: Path) -> None:
    (tmp_path / "silent").mkdir()
    (tmp_path / "silent" / "__init__.py").write_text("")
    with pytest.raises(SpecError, match="op silent has no spec"):
        all_specs(tmp_path)


def test_every_public_op_is_under_a_spec() -> None:
    """A folder with a spec might still hide a function that no spec runs."""
    called: set[str] = set()
    for spec in all_specs():
        for function in (spec.make, spec.run, *(s.run for s in spec.shardings), *spec.variants.values(), spec.timed):
            if function:
                function = inspect.unwrap(function)
                called |= _names(function.__code__, function.__globals__)
    assert {name for name, offered in vars(ops).items() if callable(offered)} <= called


def _names(code: object, scope: dict[str, object]) -> set[str]:
    """The global names that a function uses, and those that the module's own functions it calls use."""
    found = set(code.co_names)  # type: ignore[attr-defined]
    for name in list(found):
        inner = getattr(scope.get(name), "__code__", None)
        if inner is not None and scope[name].__globals__ is scope:  # type: ignore[attr-defined]
            found |= _names(inner, scope)
    return found


def test_a_spec_must_back_its_claims() -> None:
    spec = all_specs()[0]
    with pytest.raises(SpecError, match=r"claims .*columns.* no means"):
        replace(spec, claims=(*spec.claims, "columns"))
    with pytest.raises(SpecError, match="does not claim"):
        replace(spec, claims=tuple(claim for claim in spec.claims if claim != "shard"))
