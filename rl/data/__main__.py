"""`python -m rl.data [--rows N] [+recipe=NAME] [key=value ...]`: shows what a run would read, and starts nothing."""

import sys
from collections.abc import Iterator, Mapping, Sequence

from kernels.host.command import Parser, fail, interruptible
from rl.compose import check
from rl.config import RunConfig
from rl.data import Problem, Source, left_out, open_source
from rl.environments.choice import open_hosts
from rl.errors import BAD_INPUT, UserError
from rl.evaluation.sets import EvaluationSet, open_sets
from rl.rewards.reward import judged_by
from rl.run.banner import set_line
from rl.run.screen import Screen
from rollout.tokenizer import Tokenizer

_IDS = 200  # of a prompt that are shown, and
_LETTERS = 4000  # of a text


def main(arguments: Sequence[str]) -> None:
    """Prints the counts of a run's problems and the first of them: text, ids, answer. Exit code 2 for bad input."""
    parser = Parser(prog="rl.data", description=(__doc__ or "").partition(":")[2].strip())
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what python -m rl.train is told")
    parser.add_argument("--rows", type=int, default=2, metavar="N", help="problems of each part to show; default 2")
    args = parser.parse_intermixed_args(arguments)
    console = Screen()
    try:
        if args.rows < 0:
            raise UserError(f"--rows={args.rows}: must be 0 or more")
        configs = check(args.overrides)
        if len(configs) > 1:
            raise UserError(f"these overrides stand for {len(configs)} runs: the data of one is shown")
        hosts = open_hosts(configs[0], {})
        source = open_source(configs[0], console, hosts.about if hosts else None)
        sets = open_sets(configs[0], source.tokenizer, source.train, console, console.warn)
    except BAD_INPUT as error:
        fail(error, 2)
    for line in (*source.warnings, *(f"eval.sets.{name}: {line}" for name, s in sets.items() for line in s.warnings)):
        console.warn(line)
    for line in [*summary(configs[0], source, sets), *examples(source, sets, args.rows)]:
        console.print(line)


def summary(config: RunConfig, source: Source, sets: Mapping[str, EvaluationSet]) -> list[str]:
    """Says in one line each how many problems there are, of what length, and what judges them."""
    lengths = sorted(len(p.prompt_ids) for p in (*source.train, *source.held_out))
    rows = {
        "train": f"{len(source.train):,} problems",
        "held out": f"{len(source.held_out):,} problems{left_out(source)}",
        "prompts": f"{lengths[0]} to {lengths[-1]} tokens, {lengths[len(lengths) // 2]} in the median",
        "tokenizer": f"{config.model.path or 'made from the data'}: {len(source.tokenizer):,} tokens; an answer ends with "
        f"{source.tokenizer.shown(source.tokenizer.ends)}",
        "judged by": judged_by(config.reward, source),
    }
    further = [f"{'set':<11}{set_line(name, one, config.eval.problems)}" for name, one in sets.items()]
    return [*source.about, *(f"{name:<11}{text}" for name, text in rows.items()), *further]


def examples(source: Source, sets: Mapping[str, EvaluationSet], count: int) -> list[str]:
    """Shows the first `count` problems of each part."""
    lines = []
    further = [(f"set {name}", one.problems) for name, one in sets.items()]
    for part, problems in (*_trained(source), ("held out", source.held_out), *further):
        for i, problem in enumerate(problems[:count], 1):
            lines += ["", f"{part} {i} of {len(problems):,}: {problem.id}", *_example(problem, source.tokenizer)]
    return lines


def _trained(source: Source) -> Iterator[tuple[str, Sequence[Problem]]]:
    """Yields what is trained on, of a mixture source by source."""
    start = 0
    for size in [share.problems for share in source.shares] or [len(source.train)]:
        yield "train", source.train[start : start + size]
        start += size


def _example(problem: Problem, tokenizer: Tokenizer) -> list[str]:
    ids = " ".join(map(str, problem.prompt_ids[:_IDS]))
    more = f" ... ({len(problem.prompt_ids)} ids)" if len(problem.prompt_ids) > _IDS else ""
    rows = {
        "prompt": tokenizer.decode(problem.prompt_ids, special=True),
        "ids": ids + more,
        "taught": problem.solution if problem.solution != problem.answer else "",
        "answer": problem.answer or "none",
        "fields": ", ".join(map(str, problem.record)),
    }
    return [line for name, text in rows.items() if text for line in _block(name, text)]


def _block(name: str, text: str) -> list[str]:
    """Writes a text beside its name, the lines of it below each other."""
    shown = text if len(text) <= _LETTERS else f"{text[:_LETTERS]}... ({len(text):,} characters)"
    first, *rest = shown.split("\n")
    return [f"  {name:<9}{first}", *(f"  {'':<9}{line}" for line in rest)]


if __name__ == "__main__":
    with interruptible():
        main(sys.argv[1:])
