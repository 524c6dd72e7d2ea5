"""What each op promises: inputs to try, a float64 reference, how its work splits, and which bits must not change.

Every folder of `kernels/ops` has a `spec.py` with a tuple `SPECS`. `kernels/contract.py` turns a spec into checks; the
contract test, the build test and `kernels.bench` all read the same specs, on every device.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from kernels.gpu.card import ALL_FAMILIES, card_of
from kernels.tree import Shard, fold

Case = Mapping[str, int]
Inputs = dict[str, Any]
Outputs = torch.Tensor | tuple[torch.Tensor, ...]
Make = Callable[[Case, torch.Generator, torch.device, torch.dtype], Inputs]
Columns = Callable[[Inputs, slice], Inputs]

_OPS = Path(__file__).resolve().parent / "ops"
_NEEDS = {
    "batch": "row_inputs",
    "position": "row_inputs",
    "padding": "row_inputs",
    "columns": "columns",
    "shard": "shardings",
    "groups": "group_sums",
}
BFLOAT16_GRADIENT = 2.0
_PLAIN = ("threads", "alignment", "strides")


class SpecError(RuntimeError):
    """Names an op without a spec, or a spec that claims what it gives no means to check."""


@dataclass(frozen=True)
class Sharding:
    """Describes one way to spread an op over ranks: rank r runs `run` on `split(inputs, Shard(r, size))`, and `join` of the
    results in rank order is the unsharded output. `most(inputs)` is a multiple of every size allowed."""

    name: str
    most: Callable[[Inputs], int]
    split: Callable[[Inputs, Shard], Inputs]
    join: Callable[[Inputs, list[Any]], Outputs]
    run: Callable[[Inputs], Any] | None = None  # what a rank computes, where that is not the op itself
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)  # the claim holds in

    def sizes(self, inputs: Inputs) -> tuple[int, ...]:
        """Returns the numbers of shards that are claimed for these inputs, of 1, 2, 4 and 8."""
        held = {v.dtype for v in inputs.values() if isinstance(v, torch.Tensor) and v.is_floating_point()}
        return tuple(n for n in (1, 2, 4, 8) if self.most(inputs) % n == 0 and held <= {torch.float32, *self.dtypes})


@dataclass(frozen=True)
class Work:
    """Counts one forward call. `backward`: the cost of the gradient in forwards."""

    flops: float
    bytes: float
    backward: float = 2.0
    by_flops: bool = True  # whether arithmetic, and not memory, is what the op should be judged by


@dataclass(frozen=True)
class OpSpec:
    """Describes one op, or one gradient of it that has a public function.

    `space` holds the values a property test may give to each key of a case, every combination of which is valid.

    accuracy: |y - reference| <= accuracy * eps32 * scale, plus eps / 2 |reference| where the output is not float32;
    `scale` in float64, of the shape of each output, by default |reference|.
    gradient_accuracy: |g - reference| <= gradient_accuracy * eps32 * max|reference| over the tensor, against float64
    autograd of `reference`; in bfloat16, where the gradient between two matmuls is rounded as well,
    <= BFLOAT16_GRADIENT * eps(bfloat16) * max|reference|.
    """

    name: str
    make: Make
    run: Callable[[Inputs], Outputs]
    reference: Callable[[Inputs], Outputs]  # on float64 inputs on the CPU; independent of the implementation
    cases: tuple[Case, ...]
    space: Mapping[str, tuple[int, ...]]
    claims: tuple[str, ...]
    accuracy: float
    work: Callable[[Case, int], Work]  # of a case and the bytes of an element
    vendor: Callable[[Inputs], Any]  # torch's own op for the same thing, differentiable where the op is
    bench: tuple[Case, ...]
    gpu_accuracy: float | None = None  # where the GPU's order is less accurate than the CPU's
    scale: Callable[[Inputs], Outputs] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    devices: tuple[str, ...] = ("cpu", "cuda")  # ("cpu",): what it makes is made on the host, for every device
    families: tuple[str, ...] = ALL_FAMILIES  # of the cards that have kernels for it
    row_inputs: tuple[str, ...] = ()  # dimension 0 is the rows, as it is of every output
    row_units: Callable[[Inputs], int] | None = None  # what a batch is made of, where that is not rows: sequences
    unit_rows: Callable[[Inputs, torch.Tensor], torch.Tensor] | None = None  # the rows of some units, concatenated
    retake: Callable[[Inputs, torch.Tensor, Inputs], None] | None = None  # mends what taking units does beyond rows
    columns: Columns | None = None
    width: Callable[[Inputs], int] = field(default=lambda inputs: 0)  # number of columns that `columns` slices
    shardings: tuple[Sharding, ...] = ()
    variants: Mapping[str, Callable[[Inputs, torch.Generator], Outputs]] = field(default_factory=dict)
    differentiable: tuple[str, ...] = ()
    group_sums: tuple[str, ...] = ()  # gradients (or "output") that sum over tokens, one leaf a group
    gradient_accuracy: float = 0.0
    describe: Callable[[Case], str] | None = None
    timed: Callable[[Inputs], Any] | None = None  # what the benchmark times, where `run` does more than the op
    contiguous: tuple[str, ...] = ("groups",)  # inputs that must be contiguous; any strides are taken elsewhere

    def __post_init__(self) -> None:
        means = {claim for claim, hook in _NEEDS.items() if getattr(self, hook)} | set(self.variants) | set(_PLAIN)
        if "output" in self.group_sums:  # rows are what it sums over, so there is no batch of them
            means -= {"batch", "position", "padding"}
        if missing := set(self.claims) - means:
            raise SpecError(f"{self.name} claims {sorted(missing)} and gives no means to check it")
        if unused := means - set(self.claims) - {"padding"}:  # rows of integers have no NaN to pad with
            raise SpecError(f"{self.name} can be checked for {sorted(unused)} and does not claim it")

    @property
    def weights(self) -> tuple[str, ...]:
        """Returns the inputs whose gradient sums over tokens."""
        return tuple(name for name in self.group_sums if name != "output")

    def label(self, case: Case) -> str:
        """Describes a case in one line."""
        return self.describe(case) if self.describe else ", ".join(f"{k} {v}" for k, v in case.items())

    def outputs(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        """Runs the op and returns its outputs as a tuple."""
        return as_tuple(self.run(inputs))

    def runs_on(self, device: torch.device) -> bool:
        """Says whether this op runs on a device; a GPU must be there."""
        there = device.type in self.devices
        return there and (device.type != "cuda" or card_of(device).family in self.families)

    def dtypes_on(self, device: torch.device) -> tuple[torch.dtype, ...]:
        """Returns float32 and bfloat16 on a CPU; on a GPU bfloat16, and float32 where the op knows nothing else. None
        where it does not run."""
        if device.type not in self.devices:
            return ()
        if device.type == "cpu" or torch.bfloat16 not in self.dtypes:
            return self.dtypes
        return (torch.bfloat16,)

    def accuracy_on(self, device: torch.device) -> float:
        """Returns the bound on the error against float64 that holds on this device."""
        return self.accuracy if device.type == "cpu" or self.gpu_accuracy is None else self.gpu_accuracy

    def units(self, inputs: Inputs) -> int:
        """Counts the units that a batch can be cut into: rows, unless the spec says otherwise."""
        return self.row_units(inputs) if self.row_units else int(inputs[self.row_inputs[0]].shape[0])

    def rows(self, inputs: Inputs, index: torch.Tensor) -> torch.Tensor:
        """Returns the rows of units `index` in the row inputs and the outputs."""
        return self.unit_rows(inputs, index) if self.unit_rows else index

    def take_rows(self, inputs: Inputs, index: torch.Tensor) -> Inputs:
        """Returns the same op on the chosen units, in that order; repeats are allowed. `groups` becomes one group of all."""
        rows = self.rows(inputs, index)
        taken = {k: v[rows] if k in self.row_inputs else v for k, v in inputs.items()}
        if "groups" in inputs:
            taken["groups"] = torch.tensor([0, len(rows)], device=inputs["groups"].device)
        if self.retake:
            self.retake(inputs, index, taken)
        return taken

    def take_groups(self, inputs: Inputs, first: int, last: int) -> Inputs:
        """Returns the same op on the rows of groups first .. last."""
        groups = inputs["groups"]
        low, high = int(groups[first]), int(groups[last])
        taken = self.take_rows(inputs, torch.arange(low, high, device=groups.device))
        taken["groups"] = groups[first : last + 1] - low
        return taken


def as_tuple(outputs: Outputs) -> tuple[torch.Tensor, ...]:
    """Wraps a single output into a tuple."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def each_tensor(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Returns `value` with every tensor of it changed, inside dicts and dataclasses too."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {k: each_tensor(v, change) for k, v in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: each_tensor(getattr(value, f.name), change) for f in fields(value)})
    return value


def concatenated(dim: int) -> Callable[[Inputs, list[Outputs]], Outputs]:
    """Declares shards whose outputs lie side by side."""
    return lambda _, parts: tuple(torch.cat(each, dim) for each in zip(*map(as_tuple, parts), strict=True))


def tree_sum(dtype_of: str) -> Callable[[Inputs, list[torch.Tensor]], torch.Tensor]:
    """Declares shards that are float32 subtrees: their sum on the tree, rounded once to the dtype of input `dtype_of`."""
    return lambda inputs, parts: fold(parts, torch.add).to(inputs[dtype_of].dtype)


def spread(
    shape: Sequence[int], generator: torch.Generator, device: torch.device, dtype: torch.dtype, octaves: int = 3
) -> torch.Tensor:
    """Draws normal numbers times 2^-octaves .. 2^octaves, so that a wrong order of a sum shows; the same on every device."""
    x = torch.randn(*shape, generator=generator)
    power = torch.randint(-octaves, octaves + 1, tuple(shape), generator=generator)
    return (x * torch.exp2(power.float())).to(dtype).to(device)


def offsets(total: int, groups: int, generator: torch.Generator) -> torch.Tensor:
    """Returns int64 [groups + 1] from 0 to total: uneven groups, some of them empty."""
    cuts = torch.randint(0, total + 1, (groups - 1,), generator=generator).sort().values
    return torch.cat([torch.tensor([0]), cuts, torch.tensor([total])])


def all_specs(folder: Path = _OPS, package: str = "kernels.ops") -> tuple[OpSpec, ...]:
    """Returns the specs of every op in `folder`; SpecError if an op has none."""
    found: dict[str, OpSpec] = {}
    for op in sorted(path.parent.name for path in folder.glob("*/__init__.py")):
        if not (folder / op / "spec.py").exists():
            raise SpecError(f"op {op} has no spec: write {folder / op / 'spec.py'}")
        specs = getattr(import_module(f"{package}.{op}.spec"), "SPECS", ())
        if not specs:
            raise SpecError(f"{folder / op / 'spec.py'} defines no SPECS")
        for spec in specs:
            if spec.name in found:
                raise SpecError(f"two specs are called {spec.name}")
            found[spec.name] = spec
    return tuple(found.values())
