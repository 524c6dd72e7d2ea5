"""`python -m trainer.bench`: forward + backward of the trainer's model, and of `transformers` with SDPA, in one run.

Both compute the log-prob of every token of the same sequences and its gradient. Ours packs without padding, sums on the
tree and is exact. `--device cuda`: at Qwen3-8B's widths, or those of another `--model`
(training_card.py).
"""

import argparse
from functools import partial
from typing import Any

import torch

from kernels.bench.peer import Comparison, arguments, median_seconds, peer
from kernels.bench.timer import Call
from kernels.host.command import count, progress
from kernels.model import Layout
from kernels.model.known import BENCH
from kernels.weights.initial import initial
from trainer.model import TrainerModel


def _sizes(shape: str) -> tuple[int, int]:
    sequences, _, length = shape.partition("x")
    return count(sequences), count(length)


def _shape(text: str) -> str:
    if _sizes(text)[1] < 2:
        raise argparse.ArgumentTypeError(f"{text}: a sequence of one token has no log-prob")
    return text


def parsed() -> argparse.Namespace:
    """Returns the arguments, or ends with one line."""
    parser = arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", type=_shape, help="sequences x tokens")
    parser.add_argument("--layers", type=count, help="of the model, on a GPU; 6, or 4 of a mixture of experts")
    parser.add_argument(
        "--fast", action="store_true", help="also numerics=fast, and steps with the optimizer; on a GPU"
    )
    parser.add_argument("--compiled", action="store_true", help="also transformers' body by torch.compile; on a GPU")
    parser.add_family()
    args = parser.parse_args()
    parser.require(args.device, args.family)
    if args.device == "cuda":
        return args
    if args.fast or args.compiled:
        parser.error("--fast and --compiled are of --device cuda")
    args.shapes = args.shapes or ["1x512", "4x128", "64x16"]
    if (longest := max(_sizes(shape)[1] for shape in args.shapes)) > BENCH.max_positions:
        parser.error(f"--shapes: {longest} tokens; the model has {BENCH.max_positions} positions")
    return args


def main() -> None:
    """Prints tokens per second of each shape."""
    args = parsed()
    if args.device == "cuda":
        from kernels.bench import training_card  # triton, which a machine without a GPU may lack

        shapes = args.shapes or list(training_card.SHAPES)
        training_card.run(args.model, shapes, args.layers, args.repeats, args.fast, args.compiled, args.json)
        return
    torch.set_num_threads(args.threads)
    theirs, ours = peer().train(), TrainerModel(BENCH)
    named = dict(ours.named_parameters())
    with torch.no_grad():
        for parameter, whole in initial(BENCH, 0):
            named[parameter.name].copy_(whole)
    table = Comparison("forward + backward", "sequences x tokens", args.threads)
    for shape in progress(args.shapes):
        sequences, length = _sizes(shape)
        ids = torch.randint(0, BENCH.vocab_size, (sequences, length), generator=torch.Generator().manual_seed(0))
        work = _ours(ours, ids), partial(_theirs, theirs, ids)
        table.add(shape, sequences * length, *(median_seconds(side, args.repeats) for side in work))
    table.show(args.json)


def _ours(model: TrainerModel, ids: torch.Tensor) -> Call:
    sequences, length = ids.shape
    layout = Layout.packed([length] * sequences, [1] * sequences)
    targets = torch.cat([torch.arange(1, length) + i * length for i in range(sequences)])
    groups = torch.arange(sequences + 1) * (length - 1)
    temperatures = torch.ones(len(targets))

    def step() -> None:
        model(ids.flatten(), layout, targets, groups, temperatures).sum().backward()
        model.zero_grad()

    return step


def _theirs(model: Any, ids: torch.Tensor) -> None:
    logits = model(ids, use_cache=False).logits[:, :-1]
    torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None]).sum().backward()
    model.zero_grad()
