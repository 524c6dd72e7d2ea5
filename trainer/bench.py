"""`python -m trainer.bench`: forward + backward of the trainer's model, and of `transformers` with SDPA, in one run.

Both compute the log-prob of every token of the same sequences and its gradient. Ours packs without padding, sums on the
tree and is exact. `--device cuda`: at Qwen3-8B's widths (trainer/bench_gpu.py).
"""

import argparse

import torch
from rich.console import Console

from kernels.bench.peer import BENCH_MODEL, Comparison, arguments, median_seconds, peer
from kernels.host.command import count, interruptible, progress
from kernels.model import Layout
from kernels.weights.initial import initial
from trainer.model import TrainerModel


def _sizes(shape: str) -> tuple[int, int]:
    sequences, _, length = shape.partition("x")
    return count(sequences), count(length)


def _shape(text: str) -> str:
    if _sizes(text)[1] < 2:
        raise argparse.ArgumentTypeError(f"{text}: a sequence of one token has no log-prob")
    return text


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", type=_shape, help="sequences x tokens")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--layers", type=count, default=6, help="of the 36, on a GPU")
    parser.add_argument(
        "--fast", action="store_true", help="also numerics=fast, and steps with the optimizer; on a GPU"
    )
    parser.add_argument("--compiled", action="store_true", help="also transformers' body by torch.compile; on a GPU")
    args = parser.parse_args()
    if args.device == "cuda":
        parser.require_card()
        from trainer import bench_gpu  # triton, which a machine without a GPU may lack

        shapes = args.shapes or list(bench_gpu.SHAPES)
        bench_gpu.run(shapes, args.layers, args.repeats, args.fast, args.compiled, args.json, Console(width=180))
        return
    if args.fast or args.compiled:
        parser.error("--fast and --compiled are of --device cuda")
    shapes = args.shapes or ["1x512", "4x128", "64x16"]
    if (longest := max(_sizes(shape)[1] for shape in shapes)) > BENCH_MODEL.max_positions:
        parser.error(f"--shapes: {longest} tokens; the model has {BENCH_MODEL.max_positions} positions")
    torch.set_num_threads(args.threads)
    theirs = peer().train()
    ours = TrainerModel(BENCH_MODEL)
    named = dict(ours.named_parameters())
    with torch.no_grad():
        for parameter, whole in initial(BENCH_MODEL, 0):
            named[parameter.name].copy_(whole)

    table = Comparison("forward + backward", "sequences x tokens", args.threads)
    for shape in progress(shapes):
        sequences, length = _sizes(shape)
        ids = torch.randint(0, BENCH_MODEL.vocab_size, (sequences, length), generator=torch.Generator().manual_seed(0))
        layout = Layout.packed([length] * sequences, [1] * sequences)
        targets = torch.cat([torch.arange(1, length) + i * length for i in range(sequences)])
        groups = torch.arange(sequences + 1) * (length - 1)
        temperatures = torch.ones(len(targets))

        def step_ours() -> None:
            ours(ids.flatten(), layout, targets, groups, temperatures).sum().backward()  # noqa: B023
            ours.zero_grad()

        def step_theirs() -> None:
            logits = theirs(ids, use_cache=False).logits[:, :-1]  # noqa: B023
            torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None]).sum().backward()  # noqa: B023
            theirs.zero_grad()

        seconds = (median_seconds(work, args.repeats) for work in (step_ours, step_theirs))
        table.add(shape, sequences * length, *seconds)
    table.show(args.json)


if __name__ == "__main__":
    with interruptible():
        main()
