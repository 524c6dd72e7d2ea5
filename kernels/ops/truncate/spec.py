"""Spec of the truncation filters."""

import torch

from kernels.ops.truncate import Truncation, kept_tokens, truncate
from kernels.spec import Inputs, OpSpec, Work


def _make(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
    """Logits are multiples of 1/4, so that there are ties, and temperatures powers of two; each filter is off in some rows."""
    rows, n = case["rows"], case["n"]

    def some(values: list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)[torch.randint(0, len(values), (rows,), generator=generator)]

    inputs = {
        "logits": (torch.randn(rows, n, generator=generator) * 12).round().div(4).to(dtype),
        "temperature": some([0.5, 1.0, 2.0], torch.float32),
        "top_k": some([0, 1, 2, 5, 40, 10**6], torch.int64),
        "top_p": some([1.0, 0.999, 0.9, 0.6180339887, 0.1234567, 1e-6], torch.float32),
        "min_p": some([0.0, 0.0123, 0.1, 0.51, 1.0], torch.float32),
    }
    return {k: v.to(device) for k, v in inputs.items()}


def _reference(i: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token, from the definition."""
    rows = []
    for x, t, k, top_p, min_p in zip(
        *(i[n] for n in ("logits", "temperature", "top_k", "top_p", "min_p")), strict=True
    ):
        p = (x / t).softmax(0)
        order = sorted(range(len(p)), key=lambda v: (-float(x[v]), v))
        keep, before = [0] * len(p), 0.0
        first = order[: int(k)] if k else order
        mass = float(p[first].sum())
        for place, v in enumerate(first):
            limits = (top_p >= 1 or before < top_p * mass, p[v] >= min_p * p.max() * (1 - 1e-9))
            keep[v] = int(all(limits) or place == 0)
            before += float(p[v])
        rows.append(keep)
    return (torch.tensor(rows, dtype=torch.uint8),) * 2


def _run(i: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what is kept, and what is left of the logits."""
    filters = i["top_k"], i["top_p"], i["min_p"]
    cut = i["logits"].clone()
    truncate(cut, i["temperature"], Truncation(torch.arange(len(cut), device=cut.device), *filters))
    return kept_tokens(i["logits"], i["temperature"], *filters), (cut > -torch.inf).to(torch.uint8)


TRUNCATE = OpSpec(
    name="kept_tokens",
    make=_make,
    run=_run,
    reference=_reference,
    cases=({"rows": 1, "n": 1}, {"rows": 33, "n": 100}, {"rows": 9, "n": 1500}),
    space={"rows": (1, 2, 7, 20), "n": (1, 2, 8, 15, 16, 17, 100)},
    claims=("batch", "position", "padding", "threads", "alignment", "strides"),
    accuracy=0.0,
    dtypes=(torch.float32,),
    row_inputs=("logits", "temperature", "top_k", "top_p", "min_p"),
    work=lambda c, size: Work(30.0 * c["rows"] * c["n"], 40.0 * c["rows"] * c["n"], by_flops=False),
    vendor=lambda i: (i["logits"] / i["temperature"][:, None]).softmax(1).sort(1, descending=True).values.cumsum(1),
    bench=({"rows": 16, "n": 32768},),
)
SPECS = (TRUNCATE,)
