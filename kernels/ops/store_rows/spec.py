"""Spec of store_rows."""

import torch

from kernels.ops.store_rows import store_rows
from kernels.spec import Inputs, OpSpec, Work, spread


def _make(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
    shape = (case["heads"], case["head_dim"])
    rows = 2 * case["tokens"] + 3
    return {
        "keys": spread((rows, *shape), generator, device, dtype),
        "values": spread((rows, *shape), generator, device, dtype),
        "new_keys": spread((case["tokens"], *shape), generator, device, dtype),
        "new_values": spread((case["tokens"], *shape), generator, device, dtype),
        "slots": torch.randperm(rows, generator=generator)[: case["tokens"]].to(device),
    }


def _run(i: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = (i[n].clone(memory_format=torch.contiguous_format) for n in ("keys", "values"))
    store_rows(keys, values, i["slots"], i["new_keys"], i["new_values"])
    return keys, values


def _reference(i: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = i["keys"].clone(), i["values"].clone()
    for t, slot in enumerate(i["slots"].tolist()):
        keys[slot], values[slot] = i["new_keys"][t], i["new_values"][t]
    return keys, values


STORE_ROWS = OpSpec(
    name="store_rows",
    make=_make,
    run=_run,
    reference=_reference,
    cases=(
        {"tokens": 1, "heads": 1, "head_dim": 16},
        {"tokens": 9, "heads": 3, "head_dim": 32},
        {"tokens": 20, "heads": 8, "head_dim": 256},
    ),
    space={"tokens": (1, 2, 7), "heads": (1, 2, 3), "head_dim": (16, 48)},
    claims=("threads", "alignment", "strides"),
    accuracy=0.0,
    work=lambda c, size: Work(0.0, 4.0 * size * c["tokens"] * c["heads"] * c["head_dim"], by_flops=False),
    vendor=lambda i: i["keys"].index_copy(0, i["slots"], i["new_keys"]),
    bench=({"tokens": 64, "heads": 8, "head_dim": 128},),
)
SPECS = (STORE_ROWS,)
