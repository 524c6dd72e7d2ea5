"""The contract of every op, from its spec: bits that must not change, accuracy against float64, and gradients.

Bits are compared on bytes. Only accuracy has a tolerance, in units of the dtype; `OpSpec` says in which norm.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import contract
from kernels.spec import BFLOAT16_GRADIENT, Case, Inputs, OpSpec, all_specs, as_tuple, each_tensor
from tests.bits import assert_same_bits, integers

SPECS = all_specs()


def claiming(claim: str) -> Any:
    return pytest.mark.parametrize("spec", [s for s in SPECS if claim in s.claims], ids=lambda s: s.name)


def having(what: Callable[[OpSpec], object]) -> Any:
    return pytest.mark.parametrize("spec", [s for s in SPECS if what(s)], ids=lambda s: s.name)


def per_row(spec: OpSpec) -> list[str]:
    return [name for name in spec.differentiable if name not in spec.weights]


def made(spec: OpSpec, case: Case, seed: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    return spec.make(case, torch.Generator().manual_seed(seed), device, dtype)


def drawn(data: st.DataObject, spec: OpSpec, device: torch.device) -> Inputs:
    """Inputs of a random case of the spec's space."""
    case = {key: data.draw(st.sampled_from(values), key) for key, values in spec.space.items()}
    dtype = data.draw(st.sampled_from(spec.dtypes_on(device)), "dtype")
    return made(spec, case, data.draw(st.integers(0, 999), "seed"), device, dtype)


def every_case(spec: OpSpec, device: torch.device) -> Iterable[tuple[Inputs, torch.dtype, Case]]:
    for dtype in spec.dtypes_on(device):
        for seed, case in enumerate(spec.cases):
            yield made(spec, case, seed, device, dtype), dtype, case


def units(data: st.DataObject, spec: OpSpec, inputs: Inputs, *, unique: bool = False) -> torch.Tensor:
    count = spec.units(inputs)
    index = data.draw(
        st.lists(st.integers(0, count - 1), min_size=1, max_size=min(count + 2, 12), unique=unique), "units"
    )
    return torch.tensor(index, device=inputs[spec.row_inputs[0]].device)


def check(pairs: Iterable[contract.Pair]) -> int:
    __tracebackhide__ = True
    count = 0
    for what, actual, expected in pairs:
        assert_same_bits(actual, expected, what)
        count += 1
    return count


# Outputs --------------------------------------------------------------------------------------------------------------


@claiming("batch")
@given(st.data())
def test_batch_and_position(spec: OpSpec, device: torch.device, data: st.DataObject) -> None:
    inputs = drawn(data, spec, device)
    assert check(contract.of_rows(spec, inputs, units(data, spec, inputs)))


@claiming("batch")
def test_every_unit_alone(spec: OpSpec, device: torch.device) -> None:
    inputs = made(spec, spec.cases[1], 1, device, spec.dtypes_on(device)[0])
    whole = spec.outputs(inputs)
    for unit in range(min(spec.units(inputs), 60)):
        index = torch.tensor([unit], device=device)
        rows = spec.rows(inputs, index)
        assert_same_bits(
            spec.outputs(spec.take_rows(inputs, index)), tuple(y[rows] for y in whole), f"unit {unit} alone"
        )


@claiming("batch")
def test_no_units(spec: OpSpec, device: torch.device) -> None:
    inputs = made(spec, spec.cases[1], 1, device, spec.dtypes_on(device)[0])
    none = torch.zeros(0, dtype=torch.int64, device=device)
    for y, whole in zip(spec.outputs(spec.take_rows(inputs, none)), spec.outputs(inputs), strict=True):
        assert y.shape == (0, *whole.shape[1:]) and y.dtype == whole.dtype


@claiming("padding")
@given(st.data())
def test_neighbours_may_be_nan(spec: OpSpec, device: torch.device, data: st.DataObject) -> None:
    inputs = drawn(data, spec, device)
    assert check(contract.of_neighbours(spec, inputs, units(data, spec, inputs, unique=True)))


@claiming("columns")
@given(st.data())
def test_columns(spec: OpSpec, device: torch.device, data: st.DataObject) -> None:
    inputs = drawn(data, spec, device)
    width = spec.width(inputs)
    first = data.draw(st.integers(0, width - 1), "first")
    last = data.draw(st.integers(first + 1, width), "last")
    assert check(contract.of_columns(spec, inputs, slice(first, last)))


@claiming("shard")
@given(st.data())
def test_shards(spec: OpSpec, device: torch.device, data: st.DataObject) -> None:
    inputs = drawn(data, spec, device)
    for size in (1, 2, 4, 8):
        check(contract.of_shards(spec, inputs, size))


@claiming("shard")
def test_eight_shards(spec: OpSpec, device: torch.device) -> None:
    """Every way to shard is tried with 8 ranks, not only where a drawn case happens to allow it."""
    tried = 0
    for inputs, _, _ in every_case(spec, device):
        tried += check(contract.of_shards(spec, inputs, 8))
    assert tried >= sum(bool(set(s.dtypes) & set(spec.dtypes_on(device))) for s in spec.shardings)


@claiming("threads")
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_threads(spec: OpSpec, count: int) -> None:
    cpu = torch.device("cpu")
    for inputs, _, _ in every_case(spec, cpu):
        assert check(contract.of_threads(spec, inputs, count))


@claiming("alignment")
@pytest.mark.parametrize("elements", [1, 3, 7])
def test_alignment(spec: OpSpec, device: torch.device, elements: int) -> None:
    inputs = made(spec, spec.cases[1], 1, device, spec.dtypes_on(device)[-1])
    assert check(contract.of_alignment(spec, inputs, elements))


@claiming("strides")
def test_strides(spec: OpSpec, device: torch.device) -> None:
    for inputs, _, case in every_case(spec, device):
        if case.get("longest", 0) < 512:  # length is not what strides are about
            assert check(contract.of_strides(spec, inputs))


@having(lambda s: s.variants)
@given(st.data())
def test_variants(spec: OpSpec, device: torch.device, data: st.DataObject) -> None:
    inputs = drawn(data, spec, device)
    assert check(
        contract.of_variants(spec, inputs, torch.Generator().manual_seed(data.draw(st.integers(0, 99), "order")))
    )


@having(lambda s: s.variants)
def test_variants_of_every_case(spec: OpSpec, device: torch.device) -> None:
    for inputs, _, _ in every_case(spec, device):
        assert check(contract.of_variants(spec, inputs, torch.Generator().manual_seed(0)))


@having(lambda s: True)
def test_every_output_is_written(spec: OpSpec, device: torch.device) -> None:
    """What torch.empty gives is NaN here, so an output that is not written is."""
    assert torch.empty(3, device=device).isnan().all(), "memory is not poisoned: this test could not fail"
    for inputs, _, case in every_case(spec, device):
        for y in contract.outputs_and_gradients(spec, inputs):
            if y.is_floating_point():
                finite = y.float().isfinite()
                assert finite.all(), f"{case}: {int((~finite).sum())} of {y.numel()} outputs are not finite"


@claiming("padding")
def test_a_nan_is_not_hidden(spec: OpSpec, device: torch.device) -> None:
    """One NaN in a unit's inputs comes out as a NaN of that unit. A sampler that has no winner says so by the id -1; a mask has
    no NaN, and is applied to what has."""
    inputs = made(spec, spec.cases[1], 1, device, spec.dtypes_on(device)[0])
    for unit in (0, spec.units(inputs) - 1):
        rows = spec.rows(inputs, torch.tensor([unit], device=device))
        for name in spec.row_inputs:
            if inputs[name].is_floating_point() and spec.name not in ("gumbel_argmax", "kept_tokens"):
                broken = inputs[name].clone()
                broken[rows[-1]].view(-1)[-1] = torch.nan
                outputs = [
                    y[rows].isnan().any() for y in spec.outputs({**inputs, name: broken}) if y.is_floating_point()
                ]
                every = any if spec.name in ("adamw", "norm_rope") else all
                assert every(outputs), f"a NaN in {name} of unit {unit} is lost"


@having(lambda s: True)
def test_inputs_are_left_alone(spec: OpSpec, device: torch.device) -> None:
    for inputs, _, _ in every_case(spec, device):
        before = each_tensor(inputs, torch.clone)
        contract.outputs_and_gradients(spec, inputs)
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                assert_same_bits(value, before[name], f"input {name}")


@having(lambda s: True)
def test_accuracy(spec: OpSpec, device: torch.device) -> None:
    worst = 0.0
    for inputs, _, case in every_case(spec, device):
        wide = widened(inputs)
        expected = as_tuple(spec.reference(wide))
        scales = as_tuple(spec.scale(wide)) if spec.scale else tuple(e.abs() for e in expected)
        for y, e, s in zip(spec.outputs(inputs), expected, scales, strict=True):
            assert y.shape == e.shape
            if not y.is_floating_point():
                assert_same_bits(y.cpu(), e, f"{case}: ids")
                continue
            error = (y.double().cpu() - e).abs()
            if y.dtype != torch.float32:  # the last rounding: half an ulp of what it rounds
                error = (error - torch.finfo(y.dtype).eps / 2 * e.abs()).clamp(min=0)
            unit = torch.finfo(torch.float32).eps * s.expand_as(e)
            worst = max(worst, float((error / unit.clamp(min=torch.finfo(torch.float32).tiny)).max()))
    allowed = spec.accuracy_on(device)
    assert worst <= allowed, f"{worst:.2f} eps32 of the scale, {allowed} allowed"


def widened(inputs: Inputs) -> Inputs:
    return each_tensor(inputs, lambda t: t.double().cpu() if t.is_floating_point() else t.cpu())


# Gradients ------------------------------------------------------------------------------------------------------------


@having(lambda s: s.differentiable)
def test_gradient_accuracy(spec: OpSpec, device: torch.device) -> None:
    for inputs, dtype, case in every_case(spec, device):
        dy = contract.cotangent(spec, inputs)
        wide = widened(inputs)
        leaf = {name: wide[name].requires_grad_() for name in spec.differentiable}
        expected = torch.autograd.grad(as_tuple(spec.reference(wide))[0], list(leaf.values()), dy.double().cpu())
        for (name, g), e in zip(contract.gradients(spec, inputs, dy).items(), expected, strict=True):
            assert g.dtype == inputs[name].dtype and g.shape == e.shape
            unit = torch.finfo(dtype).eps * float(e.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
            error = float((g.double().cpu() - e).abs().max()) / unit
            allowed = spec.gradient_accuracy if dtype == torch.float32 else BFLOAT16_GRADIENT
            assert error <= allowed, f"{name} {dtype} {case}: {error:.2f} eps of the largest, {allowed} allowed"


@having(per_row)
@given(st.data())
def test_gradients_of_a_unit_do_not_know_its_neighbours(
    spec: OpSpec, device: torch.device, data: st.DataObject
) -> None:
    inputs = drawn(data, spec, device)
    assert check(contract.of_row_gradients(spec, inputs, units(data, spec, inputs, unique=True)))


@claiming("groups")
@given(st.data())
def test_group_sums(spec: OpSpec, device: torch.device, data: st.DataObject) -> None:
    inputs = drawn(data, spec, device)
    assert check(contract.of_groups(spec, inputs, data.draw(st.sampled_from([1, 2, 4, 8]), "chunk")))


@claiming("groups")
def test_group_sums_of_every_case(spec: OpSpec, device: torch.device) -> None:
    for inputs, _, _ in every_case(spec, device):
        for chunk in (1, 2, 4):
            assert check(contract.of_groups(spec, inputs, chunk))


@having(lambda s: s.weights)
def test_master_weights(spec: OpSpec, device: torch.device) -> None:
    for seed, case in enumerate(spec.cases):
        inputs = made(spec, case, seed, device, torch.bfloat16)
        for name in spec.weights:  # the weights that the op sees really differ
            assert not torch.equal(contract.with_master_weights(spec, inputs)[name], inputs[name].float())
        assert check(contract.of_master_weights(spec, inputs))


@claiming("groups")
def test_the_groups_matter(spec: OpSpec) -> None:
    """Otherwise the tests above would say nothing: all groups but the first made one must change some bit."""
    inputs = made(spec, spec.cases[1], 1, torch.device("cpu"), spec.dtypes[0])
    merged = {**inputs, "groups": torch.cat([inputs["groups"][:2], inputs["groups"][-1:]])}
    if spec.weights:
        dy, name = contract.cotangent(spec, inputs), spec.weights[0]
        a, b = contract.gradients(spec, inputs, dy)[name], contract.gradients(spec, merged, dy)[name]
    else:
        a, b = spec.outputs(inputs)[0], spec.outputs(merged)[0]
    assert not torch.equal(integers(a), integers(b))


@having(lambda s: s.differentiable)
def test_a_broadcast_cotangent(spec: OpSpec, device: torch.device) -> None:
    for inputs, _, case in every_case(spec, device):
        if case.get("longest", 0) < 512:
            assert check(contract.of_broadcast_cotangent(spec, inputs))
