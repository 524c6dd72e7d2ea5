"""Compiles every GPU kernel and every plan of the tuning tables for a card that need not be there:

    python -m tests.kernels.gpu.compile [--quick] [--capability 90] [--family portable] [--triton FOLDER] [--workers N]
        [--json FILE]

--quick: one variant of each kernel. --triton: the folder of another Triton than the installed one, as `pip install --target`
leaves it. Exits with 1 where a variant does not compile, needs more shared memory than the card has, spills more than STACK
bytes of a thread, multiplies matrices by another instruction than the card's family has, or a kernel has no call.
"""

import json
import os
import sys
from argparse import ArgumentParser
from dataclasses import asdict
from pathlib import Path

from kernels.device import family_of
from kernels.gpu.ahead import Compiled, Source, compile_ahead
from kernels.gpu.card import KNOWN, Card, choose_family

STACK, STACK_ON_10 = 832, 2752
"""Bytes of a thread that may spill; and on the 10s, where tiles have fewer warps than they were made for (`Card.warps`)."""
PRODUCTS = {True: {"wgmma", "mma.sync.m16n8k16"}, False: {"mma.sync.m16n8k16"}}
"""By whether the card is of 9.0: the kinds of matrix instruction that its kernels may have. Where there are two, the tests of
tests/kernels/gpu compare them, on such a card, with one order; elsewhere there is one."""


def faults(row: Compiled, card: Card) -> list[str]:
    """Lists what is wrong with a variant for a card."""
    others = set(row.products) - PRODUCTS[card.capability == (9, 0)]
    stack = STACK_ON_10 if card.capability[0] == 10 else STACK
    return [
        *([row.error] if row.error else []),
        *([f"{row.shared} B of shared memory of {card.shared_memory}"] if row.shared > card.shared_memory else []),
        *([f"{row.stack} B of stack of {stack}"] if row.stack > stack else []),
        *([f"it multiplies by {', '.join(sorted(others))}"] if others else []),
    ]


def expected_of(family: str | None) -> Path:
    """Returns the file of the recorded hashes of a family of kernels."""
    return Path(__file__).with_name(f"expected_hashes_{family}.json")


def calls(quick: bool, family: str) -> None:
    """Launches every kernel of a family; not `quick`: at the wide shapes and with every plan too."""
    import torch

    from tests.kernels.gpu import calls as listed

    listed.CUDA = torch.device("cpu")
    for name, call in listed.small(family).items():
        call(listed.generator(name))
    peers()
    model()
    if not quick:
        for name, call in listed.wide(family).items():
            call(listed.generator(name))
        if family == "hopper":
            plans()


def peers() -> None:
    """The kernels over peer memory, which a group of ranks would launch."""
    import torch

    from kernels.collectives import peer_kernels
    from kernels.collectives.peer_kernels import stream_kernel, tagged_kernel
    from kernels.collectives.peers import COUNTERS, SLOTS, Areas
    from kernels.gpu.launch import launch

    names = ("REDUCE", "SCATTER", "GATHER", "WHOLE")
    REDUCE, SCATTER, GATHER, WHOLE = (getattr(peer_kernels, name).value for name in names)
    floats, halves, words = (torch.zeros(1 << 16, dtype=d) for d in (torch.float32, torch.bfloat16, torch.int32))
    for size in (2, 8):
        addresses = tuple((1 << 40) + 4096 * i for i in range(size))
        areas = Areas(size)
        for kind, x, out in ((REDUCE, floats, halves), (GATHER, words, words)):
            given = (x, out, addresses, words, 1024, areas.capacity, 1, size, kind, 256, COUNTERS)
            launch(tagged_kernel, (4,), *given, num_warps=4)
        for kind, x, out, lag in (
            (REDUCE, floats, halves, 1),
            (REDUCE, floats, halves, 2),
            (SCATTER, floats, floats, 1),
            (GATHER, words, words, 1),
            (WHOLE, floats, halves, 1),
        ):
            given = (x, out, addresses, addresses, addresses, words, 8192, 4096, 1, size, kind)
            launch(stream_kernel, (8,), *given, min(4096, areas.stride), areas.stride, SLOTS, lag, num_warps=8)


def plans() -> None:
    """Every plan of the tuning table, every number of leaves and layout of the rings."""
    import torch

    from kernels.ops.matmul.hopper import grouped, many_rows, weight_stream
    from kernels.ops.matmul.hopper.tuning import TABLE, ManyRows
    from kernels.ops.matmul.portable import few_rows
    from kernels.ops.matmul.portable.plans import FewRows

    bf16, f32 = torch.bfloat16, torch.float32

    def zeros(*shape: int, dtype: torch.dtype = bf16) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    for (m, n, k, leaves), plan in TABLE.items():
        plan = plan.below if isinstance(plan, ManyRows) else plan
        module = few_rows if isinstance(plan, FewRows) else weight_stream
        module.contract(zeros(m, k), zeros(n if n <= 30_000 else 2048, k), leaves, bf16, **plan._asdict())
    weight_stream.contract(zeros(128, 1024), zeros(2048, 1024), 8, f32, BN=64, split=8, rows=128)
    for leaves in (1, 2, 4, 8):
        for b_mn in (False, True):
            for dtype in (bf16, f32):
                b, y = zeros(1024, 512) if b_mn else zeros(512, 1024), zeros(512, 512, dtype=dtype)
                many_rows.launch(zeros(512, 1024), b, y, 512, 512, leaves, b_mn=b_mn)
    many_rows.launch(zeros(1024, 1024), zeros(1024, 1024), zeros(1024, 1024), 1024, 1024, 1, BN=256)
    for groups, width in ((1, 512), (2, 512), (4, 512), (8, 512), (32, 512), (1, 2048)):
        bounds = torch.linspace(0, 2048, groups + 1).to(torch.int64)
        out = zeros(width, width, dtype=f32)
        grouped.launch(zeros(2048, width), zeros(2048, width), bounds, out)
    fp8_plans()


def fp8_plans() -> None:
    """Every kernel of the matmul of block-scaled FP8, by leaves and output, and every plan of its table."""
    import torch

    from kernels.ops.matmul.hopper.tuning import Stream
    from kernels.ops.matmul_fp8.hopper import many_rows, weight_stream
    from kernels.ops.matmul_fp8.hopper.tuning import TABLE
    from kernels.ops.quantize.hopper import column_scales

    def given(m: int, leaves: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
        x, w = (torch.zeros(n, 4096, dtype=torch.uint8).view(torch.float8_e4m3fn) for n in (m, 2048))
        return x, column_scales(torch.zeros(m, 32)), w, torch.zeros(16, 32), leaves

    listed = {(m, leaves, getattr(plan, "below", plan)) for (m, _, _, leaves), plan in TABLE.items()}
    listed |= {(m, leaves, Stream(m, 1, rows)) for m in (16, 32, 64) for leaves in (1, 2, 4, 8) for rows in (64, 128)}
    listed |= {(64, 8, Stream(64, split)) for split in (2, 4, 8)} | {(64, 8, Stream(64, 1, 64, 2))}
    for m, leaves, plan in sorted(listed):
        weight_stream.contract(*given(m, leaves), torch.bfloat16, **plan._asdict())
    weight_stream.contract(*given(16, 2), torch.float32, BN=16, split=1)
    for leaves in (1, 2, 4, 8):
        for dtype in (torch.bfloat16, torch.float32):
            for nodes in (False, True):
                many_rows.contract(*given(512, leaves), dtype, nodes=nodes)


def model() -> None:
    """What small models launch, served by two ranks and trained: the shapes that a run compiles ahead."""
    from kernels.model.ahead import launches

    hf = {
        "model_type": "qwen3",
        "vocab_size": 2048,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
    }
    serving = {"tp": 2, "page_size": 16, "most_running": 64, "most_tokens": 2048}
    launches(hf, 8, "bfloat16", serving, True)
    mixture = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 256, "num_hidden_layers": 2}
    launches(hf | mixture | {"model_type": "qwen3_moe"}, 8, "bfloat16", serving, True)


def main() -> int:
    parser = ArgumentParser(prog="python -m tests.kernels.gpu.compile", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--capability", type=int, default=90, choices=sorted(KNOWN))
    parser.add_argument("--family", default="auto", choices=("auto", "portable"))
    parser.add_argument("--triton", type=Path)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.triton:
        sys.path.insert(0, str(args.triton.resolve()))
    import triton

    from tests.kernels.gpu.calls import all_kernels

    card = KNOWN[args.capability]
    choose_family(args.family)
    family = family_of(card)  # refuses one that has no kernels

    def report(row: Compiled, known: int) -> None:
        kinds = "".join(f", {kind}" for kind in row.products)
        state = row.error or f"{row.registers} registers, {row.stack} B of stack, {row.shared} B shared{kinds}"
        print(f"{row.seconds:6.1f} s  {row.kernel.removeprefix('kernels.')}: {state}", flush=True)

    source = Source("tests.kernels.gpu.compile:calls", {"quick": args.quick, "family": family})
    path = str(args.triton.resolve()) if args.triton else ""
    rows = compile_ahead(source, card, args.workers, report, args.quick, path, args.family)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    failed = [row.kernel for row in rows if faults(row, card)]
    for row in rows:
        for fault in faults(row, card):
            print(f"FAULT {row.kernel}: {fault}")
    kinds = sorted({kind for row in rows for kind in row.products})
    missing = {n for n in all_kernels() if ".hopper" not in n or family == "hopper"} - {row.kernel for row in rows}
    print(
        f"triton {triton.__version__}, sm_{args.capability}: {len(rows)} variants of {len({r.kernel for r in rows})} kernels "
        f"compiled, {len(failed)} failed {sorted(set(failed))}, no call for {sorted(missing)}; at most "
        f"{max(r.stack for r in rows)} B of stack and {max(r.shared for r in rows):,} B shared; products by {', '.join(kinds)}"
    )
    expected = expected_of(family)
    if unrecorded := (entries(family) ^ json.loads(expected.read_text()).keys()) ^ awaited(family):
        print(f"{expected.name} lacks, or has too many: {sorted(unrecorded)}")
    return 1 if failed or missing or unrecorded else 0


AWAITED = frozenset(
    {
        "spec expert_low_rank_gradients: rows 53, K 96, N 3, experts 16, k 3, rank 16, matrices 2, groups 7, bfloat16",
        "spec low_rank_gradients: rows 40, columns 3, leaf 16, leaves 8, rank 32, sections 2, groups 7, bfloat16",
        "spec merge_low_rank: rows 40, n 300, rank 33, bfloat16",
    }
)
"""Entries that no card has run since their ops came: `hashes --write` records them, and then they leave this list."""


AWAITED_HOPPER = frozenset(
    {
        *(f"matmul of FP8, {m} rows, K 4096, 8 leaves" for m in (1, 64, 200, 700)),
        *(
            f"matmul of FP8, {m} rows, K {k}, {leaves} leaves"
            for m in (16, 700)
            for k, leaves in ((12288, 8), (2048, 4), (6144, 2), (1536, 1))
        ),
        "quantization, 70 rows",
        "quantization, powers of two",
        "spec dequantize_blocks: blocks 3, columns 2, bfloat16",
        "spec matmul_fp8: M 33, N 256, K 1024, 4 leaves, scales powers of two, bfloat16",
        "spec quantize_blocks: blocks 3, columns 2, power_of_two 1, bfloat16",
        "spec quantize_rows: rows 40, columns 3, power_of_two 1, bfloat16",
    }
)
"""The same of kernels that Hopper's family alone has."""


def awaited(family: str) -> frozenset[str]:
    """Returns the entries of a family that no card has run."""
    return AWAITED | AWAITED_HOPPER if family == "hopper" else AWAITED


def entries(family: str) -> set[str]:
    """Returns the names of what has a recorded hash."""
    from tests.kernels.gpu.calls import hashed

    return {name for name, _ in hashed(family)}


if __name__ == "__main__":
    sys.exit(main())
