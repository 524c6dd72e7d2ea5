"""Specs of attention: packed sequences (training, prefill), and one query a sequence over pages (decoding)."""

from dataclasses import replace

import torch

from kernels.ops.attention import Pages, attention
from kernels.spec import Inputs, OpSpec, Sharding, Work, concatenated, spread

_NOWHERE = 1 << 30  # a page number that must never be read
_ROUNDED_WEIGHTS = 2.0**13  # a weight that enters a tensor core is bfloat16: at most 2^15 eps32 off, each its own way
_PAGE_SIZES = (1, 3, 16, 64, 100)


def packed(lengths: torch.Tensor, device: torch.device) -> Pages:
    """Returns the identity page table of sequences that lie one after another."""
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    position = torch.arange(int(lengths.max()) if len(lengths) else 0)
    table = torch.where(position < lengths[:, None], starts[:-1, None] + position, _NOWHERE).to(torch.int32)
    sequence = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), lengths)
    within = torch.arange(int(starts[-1])) - starts[:-1].repeat_interleave(lengths)
    table, sequence, position, starts = (t.to(device) for t in (table, sequence, within.to(torch.int32), starts))
    return Pages(table, 1, sequence, position, starts, packed=True)


def _lengths(pages: Pages) -> torch.Tensor:
    return pages.starts.cpu().diff()


def _draw_lengths(case, generator: torch.Generator) -> torch.Tensor:  # type: ignore[no-untyped-def]
    n = case["longest"]
    if not case["ragged"]:
        return torch.full((case["sequences"],), n)
    lengths = torch.randint(1, n + 1, (case["sequences"],), generator=generator)
    lengths[int(torch.randint(0, case["sequences"], (), generator=generator))] = n
    return lengths


def _make(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
    lengths = _draw_lengths(case, generator)
    tokens, kv, D = int(lengths.sum()), case["kv_heads"], case["head_dim"]
    return {
        "q": spread((tokens, kv * case["group"], D), generator, device, dtype, octaves=1),
        "keys": spread((tokens, kv, D), generator, device, dtype, octaves=1),
        "values": spread((tokens, kv, D), generator, device, dtype),
        "pages": packed(lengths, device),
        "scale": D**-0.5,
    }


def _run(i: Inputs) -> torch.Tensor:
    return attention(i["q"], i["keys"], i["values"], i["pages"], i["scale"])


def _dense(i: Inputs, values: torch.Tensor, of_scores) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Computes the definition, a query at a time over a plain gather of its keys: of_scores(q, k, causal softmax) of each."""
    pages, group = i["pages"], i["q"].shape[1] // i["keys"].shape[1]
    rows = []
    for s in range(pages.table.shape[0]):
        mine = (pages.sequence == s).nonzero()[:, 0]
        if not len(mine):
            continue
        at = torch.arange(int(pages.position[mine].max()) + 1)
        row = pages.table[s, at // pages.size].long() * pages.size + at % pages.size
        k, v = (t[row].repeat_interleave(group, 1) for t in (i["keys"], values))
        q = i["q"][mine]
        hidden = at[None, None, :] > pages.position[mine].long()[None, :, None]
        score = (torch.einsum("thd,jhd->htj", q, k) * i["scale"]).masked_fill(hidden, -torch.inf)
        rows.append((mine, of_scores(q, k, v, score.softmax(-1), hidden) if of_scores else _mix(score.softmax(-1), v)))
    order = torch.cat([mine for mine, _ in rows]).argsort()
    return torch.cat([row for _, row in rows])[order]


def _mix(weight: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.einsum("htj,jhd->thd", weight, v)


def _reference(i: Inputs) -> torch.Tensor:
    return _dense(i, i["values"], None)


def _scale(i: Inputs) -> torch.Tensor:
    """sum_j p_j |v_j| (1 + largest sum |q k| scale): an error of a score is relative to the magnitudes in its dot."""

    def grown(q, k, v, weight, hidden):  # type: ignore[no-untyped-def]
        size = torch.einsum("thd,jhd->htj", q.abs(), k.abs()) * i["scale"]
        return _mix(weight, v) * (1 + size.masked_fill(hidden, 0).amax(-1).T[:, :, None])

    return _dense(i, i["values"].abs(), grown)


def _sequence_rows(i: Inputs, index: torch.Tensor) -> torch.Tensor:
    starts = i["pages"].starts.tolist()
    rows = [row for s in index.tolist() for row in range(starts[s], starts[s + 1])]
    return torch.tensor(rows, dtype=torch.int64, device=i["q"].device)


def _retake(i: Inputs, index: torch.Tensor, taken: Inputs) -> None:
    taken["pages"] = packed(_lengths(i["pages"])[index.cpu()], i["q"].device)


def _scatter(i: Inputs, lengths: torch.Tensor, size: int, generator: torch.Generator) -> Inputs:
    """Returns the same keys in a pool of shuffled pages: what no sequence owns is NaN, the table points nowhere past an end."""
    device, counts = i["q"].device, (lengths + size - 1) // size
    pool_pages = int(counts.sum()) + 2
    free = torch.randperm(pool_pages, generator=generator)
    table = torch.full((len(lengths), int(counts.max())), _NOWHERE, dtype=torch.int32)
    keys, values = (t.new_full((pool_pages * size, *t.shape[1:]), torch.nan) for t in (i["keys"], i["values"]))
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    for s, n in enumerate(lengths.tolist()):
        mine, free = free[: int(counts[s])], free[int(counts[s]) :]
        table[s, : len(mine)] = mine
        at = torch.arange(n)
        row = (mine[at // size] * size + at % size).to(device)
        for pool, source in ((keys, i["keys"]), (values, i["values"])):
            pool[row] = source[int(starts[s]) : int(starts[s + 1])]
    return {
        **i,
        "keys": keys,
        "values": values,
        "pages": replace(i["pages"], table=table.to(device), size=size, packed=False),
    }


def _in_pages(i: Inputs, generator: torch.Generator) -> torch.Tensor:
    size = _PAGE_SIZES[int(torch.randint(0, len(_PAGE_SIZES), (), generator=generator))]
    return _run(_scatter(i, _lengths(i["pages"]), size, generator))


def _in_chunks(i: Inputs, generator: torch.Generator) -> torch.Tensor:
    """Chunked prefill: the queries of each sequence in random runs, keys that are not there yet NaN."""
    pages, out = i["pages"], torch.full_like(i["q"], torch.nan)
    lengths = _lengths(pages)
    done = torch.zeros_like(lengths)
    while (done < lengths).any():
        upto = torch.minimum(
            done + torch.randint(0, int(lengths.max()) // 2 + 2, done.shape, generator=generator), lengths
        )
        sequence, position = pages.sequence.cpu().long(), pages.position.cpu().long()
        mine = ((position >= done[sequence]) & (position < upto[sequence])).nonzero()[:, 0].to(out.device)
        absent = (position >= upto[sequence]).to(out.device)
        keys, values = (i[n].masked_fill(absent[:, None, None], torch.nan) for n in ("keys", "values"))
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), (upto - done).cumsum(0)]).to(out.device)
        chunk = Pages(pages.table, 1, pages.sequence[mine], pages.position[mine], starts)
        out[mine] = _run({**i, "q": i["q"][mine], "keys": keys, "values": values, "pages": chunk})
        done = upto
    return out


def _head_shard(i: Inputs, shard) -> Inputs:  # type: ignore[no-untyped-def]
    q = shard.range(i["q"].shape[1])
    kv = shard.range(i["keys"].shape[1])
    return {**i, "q": i["q"][:, q], "keys": i["keys"][:, kv], "values": i["values"][:, kv]}


def _describe(case) -> str:  # type: ignore[no-untyped-def]
    heads = f"{case['kv_heads'] * case['group']}/{case['kv_heads']} heads"
    return f"{case['sequences']} sequences of {case['longest']}, {heads} of {case['head_dim']}"


_HEADS = Sharding("heads", most=lambda i: i["keys"].shape[1], split=_head_shard, join=concatenated(1))


def _work(case, size: int) -> Work:  # type: ignore[no-untyped-def]
    heads, n = case["kv_heads"] * case["group"], case["longest"]
    tokens = case["sequences"] * n * case["head_dim"]
    moved = size * tokens * (2.0 * heads + 2 * case["kv_heads"])
    return Work(4.0 * tokens * heads * (n + 1) / 2, moved, backward=2.5)


def _vendor(i: Inputs) -> torch.Tensor:
    """Only for sequences of one length."""
    S = i["pages"].table.shape[0]
    q, k, v = (i[n].unflatten(0, (S, -1)).transpose(1, 2) for n in ("q", "keys", "values"))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    out = sdpa(q, k, v, is_causal=True, scale=i["scale"], enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(0, 1)


def _case(sequences: int, longest: int, kv_heads: int, group: int, head_dim: int, ragged: int = 1) -> dict[str, int]:
    return dict(sequences=sequences, longest=longest, kv_heads=kv_heads, group=group, head_dim=head_dim, ragged=ragged)


# Lengths on both sides of a block of 64 keys and of a split of 512.
_CASES = (_case(1, 1, 1, 1, 16), _case(4, 131, 2, 3, 32), _case(3, 64, 8, 1, 16), _case(2, 1030, 1, 2, 64))
_SPACE = {
    "sequences": (1, 2, 4),
    "longest": (1, 2, 17, 65, 127, 128, 130),
    "kv_heads": (1, 2, 4),
    "group": (1, 2, 3),
    "head_dim": (16, 32, 64),
    "ragged": (0, 1),
}
ATTENTION = OpSpec(
    name="attention",
    make=_make,
    run=_run,
    reference=_reference,
    scale=_scale,
    cases=_CASES,
    space=_SPACE,
    claims=("batch", "position", "padding", "pages", "chunks", "shard", "threads", "alignment", "strides"),
    accuracy=3.0,
    gpu_accuracy=_ROUNDED_WEIGHTS,
    row_inputs=("q", "keys", "values"),
    row_units=lambda i: i["pages"].table.shape[0],
    unit_rows=_sequence_rows,
    retake=_retake,
    shardings=(_HEADS,),
    variants={"pages": _in_pages, "chunks": _in_chunks},
    differentiable=("q", "keys", "values"),
    gradient_accuracy=40.0,
    work=_work,
    vendor=_vendor,
    describe=_describe,
    bench=(_case(16, 128, 2, 2, 64, 0), _case(2, 1024, 2, 2, 64, 0)),
)


def _make_decode(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
    whole = _make(case, generator, device, dtype)
    lengths = _lengths(whole["pages"])
    size = _PAGE_SIZES[int(torch.randint(0, len(_PAGE_SIZES), (), generator=generator))] if case["ragged"] else 16
    paged = _scatter(whole, lengths, size, generator)
    last = (lengths.cumsum(0) - 1).to(device)
    pages = paged["pages"]
    starts = torch.arange(len(lengths) + 1, device=device)
    pages = replace(pages, sequence=pages.sequence[last], position=pages.position[last], starts=starts)
    return {**paged, "q": whole["q"][last], "pages": pages}


def _retake_decode(i: Inputs, index: torch.Tensor, taken: Inputs) -> None:
    pages, count = i["pages"], torch.arange(len(index), dtype=torch.int32, device=index.device)
    starts = torch.arange(len(index) + 1, device=index.device)
    taken["pages"] = replace(
        pages, table=pages.table[index], sequence=count, position=pages.position[index], starts=starts
    )


def _decode_work(case, size: int) -> Work:  # type: ignore[no-untyped-def]
    keys = float(case["sequences"] * case["longest"] * case["head_dim"] * case["kv_heads"])
    return Work(4 * keys * case["group"], 2 * size * keys, by_flops=False)


def _decode_vendor(i: Inputs) -> torch.Tensor:
    """Over keys that are already contiguous, which is kind to it; gathered once, outside the time."""
    if "gathered" not in i:
        pages, S = i["pages"], i["q"].shape[0]
        at = torch.arange(int(pages.position.max()) + 1, device=i["q"].device)
        row = pages.table[:, at // pages.size].long() * pages.size + at % pages.size
        i["gathered"] = [
            i[n][row.flatten()].unflatten(0, (S, -1)).transpose(1, 2).contiguous() for n in ("keys", "values")
        ]
    q, (k, v) = i["q"][:, :, None], i["gathered"]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return sdpa(q, k, v, scale=i["scale"], enable_gqa=q.shape[1] != k.shape[1])[:, :, 0]


DECODE = OpSpec(
    name="attention_decode",
    make=_make_decode,
    run=_run,
    reference=_reference,
    scale=_scale,
    cases=_CASES,
    space=_SPACE,
    claims=("batch", "position", "padding", "shard", "threads", "alignment", "strides"),
    accuracy=2.0,
    gpu_accuracy=_ROUNDED_WEIGHTS,
    row_inputs=("q",),
    retake=_retake_decode,
    shardings=(_HEADS,),
    work=_decode_work,
    vendor=_decode_vendor,
    describe=_describe,
    bench=(_case(64, 512, 2, 2, 64, 0),),
)
SPECS = (ATTENTION, DECODE)
