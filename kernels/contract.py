"""A spec's claims as pairs of tensors that must have the same bits: what the contract test asserts, and what a
benchmark asks before it times anything. Nothing here knows an op by name."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kernels.spec import Inputs, OpSpec, as_tuple, each_tensor
from kernels.tree import Shard, fold

Pair = tuple[str, torch.Tensor, torch.Tensor]  # what, actual, expected
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compares dtype, shape and every bit of two tensors: NaNs are equal where their bits are, -0 differs from +0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    kind = _INTEGER[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def _pairs(what: str, actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> Iterator[Pair]:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        yield (f"{what}, output {i}" if len(expected) > 1 else what), a, e


# Where the data lie ---------------------------------------------------------------------------------------------------


def _poison(shape: tuple[int, ...] | list[int], like: torch.Tensor) -> torch.Tensor:
    value: Any = torch.nan if like.is_floating_point() else torch.iinfo(like.dtype).max
    return torch.full(tuple(shape), value, dtype=like.dtype, device=like.device)


def at_offset(t: torch.Tensor, elements: int) -> torch.Tensor:
    """Returns a contiguous copy that starts `elements` into a buffer of poison."""
    buffer = _poison([t.numel() + elements + 16], t)
    view = buffer[elements : elements + t.numel()].view(t.shape)
    return view.copy_(t)


def inside(t: torch.Tensor) -> torch.Tensor:
    """Returns a copy that is a window in a larger tensor of poison: no stride is the product of the extents below it. The last
    is 1, but for a vector's, which is 2."""
    if t.dim() == 1:
        return _poison([t.numel(), 2], t)[:, 1].copy_(t)
    window = _poison([n + 3 for n in t.shape], t)
    for dim, n in enumerate(t.shape):
        window = window.narrow(dim, 1, n)
    return window.copy_(t)


def transposed(t: torch.Tensor) -> torch.Tensor:
    """Returns a copy whose last dimension is not the fastest."""
    return inside(t) if t.dim() < 2 else inside(t.transpose(-1, -2)).transpose(-1, -2)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Sets torch's number of threads within the context, and restores it afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Outputs --------------------------------------------------------------------------------------------------------------


def of_rows(spec: OpSpec, inputs: Inputs, index: torch.Tensor) -> Iterator[Pair]:
    """Claims independence of batch and position: units alone, or in another order and company, against the same units
    of the whole."""
    part, rows = spec.outputs(spec.take_rows(inputs, index)), spec.rows(inputs, index)
    yield from _pairs(f"units {index.tolist()}", part, tuple(y[rows] for y in spec.outputs(inputs)))


def of_neighbours(spec: OpSpec, inputs: Inputs, index: torch.Tensor) -> Iterator[Pair]:
    """Claims independence of padding: every other unit is NaN."""
    rows, whole, among = spec.rows(inputs, index), spec.outputs(inputs), dict(inputs)
    for name in spec.row_inputs:
        if inputs[name].is_floating_point():
            among[name] = _poison(inputs[name].shape, inputs[name]).index_copy_(0, rows, inputs[name][rows])
    actual = tuple(y[rows] for y in spec.outputs(among))
    yield from _pairs(f"units {index.tolist()} among NaN", actual, tuple(y[rows] for y in whole))


def of_columns(spec: OpSpec, inputs: Inputs, columns: slice) -> Iterator[Pair]:
    """Yields the outputs for a slice of the output columns beside the same columns of the whole output."""
    assert spec.columns
    part = spec.outputs(spec.columns(inputs, columns))
    yield from _pairs(
        f"columns {columns.start}:{columns.stop}", part, tuple(y[..., columns] for y in spec.outputs(inputs))
    )


def of_shards(spec: OpSpec, inputs: Inputs, size: int) -> Iterator[Pair]:
    """Yields the joined outputs of `size` shards beside those of one, for every sharding that allows so many."""
    whole = spec.outputs(inputs)
    for sharding in spec.shardings:
        if size in sharding.sizes(inputs):
            parts = [(sharding.run or spec.run)(sharding.split(inputs, Shard(r, size))) for r in range(size)]
            yield from _pairs(f"{size} shards of the {sharding.name}", as_tuple(sharding.join(inputs, parts)), whole)


def of_threads(spec: OpSpec, inputs: Inputs, count: int) -> Iterator[Pair]:
    """Yields outputs and gradients of `count` threads beside those of one."""
    with threads(1):
        expected = outputs_and_gradients(spec, inputs)
    with threads(count):
        yield from _pairs(f"{count} threads", outputs_and_gradients(spec, inputs), expected)


def of_alignment(spec: OpSpec, inputs: Inputs, elements: int) -> Iterator[Pair]:
    """Yields outputs and gradients of inputs that begin `elements` into their storage beside those of aligned inputs."""
    moved = each_tensor(inputs, lambda t: at_offset(t, elements))
    yield from _pairs(
        f"storage offset {elements}", outputs_and_gradients(spec, moved), outputs_and_gradients(spec, inputs)
    )


def of_strides(spec: OpSpec, inputs: Inputs) -> Iterator[Pair]:
    """Yields outputs and gradients of inputs with other strides beside those of contiguous inputs."""
    expected = outputs_and_gradients(spec, inputs)
    for lay in (inside, transposed):
        laid = {k: lay(v) if isinstance(v, torch.Tensor) and k not in spec.contiguous else v for k, v in inputs.items()}
        yield from _pairs(f"strides of {lay.__name__}", outputs_and_gradients(spec, laid, lay), expected)


def of_variants(spec: OpSpec, inputs: Inputs, generator: torch.Generator) -> Iterator[Pair]:
    """Yields what each of the spec's other ways to the same result gives beside the outputs themselves."""
    for claim, variant in spec.variants.items():
        yield from _pairs(claim, as_tuple(variant(inputs, generator)), spec.outputs(inputs))


def with_master_weights(spec: OpSpec, inputs: Inputs) -> Inputs:
    """Returns the same op where what a gradient sums over tokens for is float32, so that no call rounds its part of the sum. A
    weight that was bfloat16 moves by less than half an ulp of that: the op must round it back."""
    nudge = 1 + 2.0**-11
    masters = {n: inputs[n].float() * nudge for n in spec.weights if inputs[n].dtype == torch.bfloat16}
    return {**inputs, **masters}


def of_master_weights(spec: OpSpec, inputs: Inputs) -> Iterator[Pair]:
    """Claims that a float32 weight against bfloat16 activations is rounded first; only its gradient is not."""
    master, dy = with_master_weights(spec, inputs), cotangent(spec, inputs)
    yield from _pairs("with master weights", spec.outputs(master), spec.outputs(inputs))
    actual, expected = gradients(spec, master, dy), gradients(spec, inputs, dy)
    for name in expected:
        yield f"gradient of {name} with master weights", actual[name].to(expected[name].dtype), expected[name]
        if name in spec.weights:
            assert actual[name].dtype == torch.float32, f"the gradient of a float32 {name} is {actual[name].dtype}"


def of_groups(spec: OpSpec, inputs: Inputs, chunk: int) -> Iterator[Pair]:
    """Claims that a sum over tokens equals the tree over the sums of its aligned runs of `chunk` groups; `chunk` a
    power of two."""
    inputs = with_master_weights(spec, inputs)
    at = inputs["groups"].tolist()
    runs = [(g, min(g + chunk, len(at) - 1)) for g in range(0, len(at) - 1, chunk)]
    if spec.weights:
        dy = cotangent(spec, inputs)
        parts = [_summed(spec, spec.take_groups(inputs, g, h), dy[at[g] : at[h]]) for g, h in runs]
        whole = _summed(spec, inputs, dy)
    else:
        parts = [spec.outputs(spec.take_groups(inputs, g, h)) for g, h in runs]
        whole = spec.outputs(inputs)
    joined = tuple(fold(list(nodes), torch.add) for nodes in zip(*parts, strict=True))
    yield from _pairs(f"the sum over {len(at) - 1} groups, {chunk} at a time", joined, whole)


def _summed(spec: OpSpec, inputs: Inputs, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(gradients(spec, inputs, dy)[name] for name in spec.weights)


# Gradients ------------------------------------------------------------------------------------------------------------


def cotangent(spec: OpSpec, inputs: Inputs, seed: int = 1) -> torch.Tensor:
    """Returns a gradient of the output: the same numbers on every device."""
    y = spec.outputs(inputs)[0]
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype).to(y.device)


def gradients(spec: OpSpec, inputs: Inputs, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """Computes the gradient of the first output to each differentiable input, by name, for the output gradient `dy`."""
    leaf = {name: inputs[name].detach().requires_grad_() for name in spec.differentiable}
    y = spec.outputs({**inputs, **leaf})[0]
    return dict(zip(leaf, torch.autograd.grad(y, list(leaf.values()), dy), strict=True))


def outputs_and_gradients(spec: OpSpec, inputs: Inputs, lay: Any = None) -> tuple[torch.Tensor, ...]:
    """Returns the outputs, and the gradients if the op has any; `lay` lays out the gradient of the output too."""
    outputs = spec.outputs(inputs)
    if not spec.differentiable:
        return outputs
    dy = cotangent(spec, inputs)
    return (*outputs, *gradients(spec, inputs, lay(dy) if lay else dy).values())


def of_row_gradients(spec: OpSpec, inputs: Inputs, index: torch.Tensor) -> Iterator[Pair]:
    """Claims that a unit's gradients do not depend on the other units, which are left out, or are NaN."""
    names = [name for name in spec.differentiable if name not in spec.weights]
    dy, rows = cotangent(spec, inputs), spec.rows(inputs, index)
    whole, part = gradients(spec, inputs, dy), gradients(spec, spec.take_rows(inputs, index), dy[rows])
    among = gradients(spec, inputs, _poison(dy.shape, dy).index_copy_(0, rows, dy[rows]))
    for name in names:
        yield f"gradient of {name} of units {index.tolist()}", part[name], whole[name][rows]
        yield f"gradient of {name} of units {index.tolist()} among NaN", among[name][rows], whole[name][rows]


def of_broadcast_cotangent(spec: OpSpec, inputs: Inputs) -> Iterator[Pair]:
    """Claims the same of a gradient with strides of zero, as y.sum().backward() sends it."""
    y = spec.outputs(inputs)[0]
    one = torch.ones((), dtype=y.dtype, device=y.device).expand(y.shape)
    actual, expected = gradients(spec, inputs, one), gradients(spec, inputs, one.contiguous())
    for name in expected:
        yield f"gradient of {name} from a broadcast one", actual[name], expected[name]


# All at once ----------------------------------------------------------------------------------------------------------


def quick(spec: OpSpec, inputs: Inputs, generator: torch.Generator) -> Iterator[Pair]:
    """Yields every claim of the spec, once."""
    device = next(v.device for v in inputs.values() if isinstance(v, torch.Tensor))
    if "batch" in spec.claims:
        units = spec.units(inputs)
        index = torch.randint(0, units, (min(units, 3),), generator=generator).to(device)
        yield from of_rows(spec, inputs, index)
        if "padding" in spec.claims:
            yield from of_neighbours(spec, inputs, index.unique())
        if set(spec.differentiable) - set(spec.weights):
            yield from of_row_gradients(spec, inputs, index.unique())
    if "columns" in spec.claims:
        width = spec.width(inputs)
        yield from of_columns(spec, inputs, slice(width // 3, width // 3 + 1 + width // 2))
    if "shard" in spec.claims:
        yield from of_shards(spec, inputs, 2)
        yield from of_shards(spec, inputs, 8)
    if "groups" in spec.claims:
        yield from of_groups(spec, inputs, 2)
    if spec.weights:
        yield from of_master_weights(spec, inputs)
    yield from of_variants(spec, inputs, generator)
    yield from of_alignment(spec, inputs, 1)
    yield from of_strides(spec, inputs)
    if device.type == "cpu":
        yield from of_threads(spec, inputs, 2)
