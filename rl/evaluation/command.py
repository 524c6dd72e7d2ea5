"""`python -m rl.evaluate MODEL [--json FILE] [--samples FILE] [key=value ...]`: what a model earns on held-out problems.

MODEL: a Hugging Face model directory, or the folder of a run, whose model is evaluated as the run did. The keys are those of
`rl.train`, on top of its defaults or of the run's config: data, reward, eval.problems, eval.samples, eval.temperature,
eval.sets, rollout.tp, rollout.max_new_tokens, seed, device. Of a model directory, eval.sets without data is evaluated alone:

  python -m rl.evaluate MODEL "eval.sets={gsm8k: {path: gsm8k/test.jsonl}, sums: {task: chain_sum, samples: 8}}"

No trainer and no Ray are started. Exit code 1: the engine failed; 2: bad
input.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kernels.device import choose_device
from kernels.host.command import Parser, fail, output, write_json
from kernels.model.ahead import Serving
from kernels.model.ahead import prepare as prepare_kernels
from rl.adapters import ADAPTER
from rl.compose import check, filled
from rl.config import RunConfig, validate
from rl.data import open_source
from rl.data.tokenizer import from_model
from rl.environments.choice import open_environment, open_hosts, set_environment
from rl.errors import BAD_INPUT, UserError
from rl.evaluation.evaluator import make_evaluator, make_set_evaluator
from rl.evaluation.measures import Evaluation
from rl.evaluation.samples import write_samples
from rl.evaluation.sets import open_sets
from rl.keys import renewed
from rl.run.banner import set_line
from rl.run.screen import Screen
from rl.samples import Group
from rollout.lockstep import Lockstep, RankError
from rollout.runner import RunnerError
from rollout.serve import BAD_INPUT as BAD_ENGINE_INPUT
from rollout.source import Source as Served


def main(arguments: Sequence[str]) -> None:
    """Evaluates what `arguments` ask for and prints what was found."""
    parser = Parser(prog="python -m rl.evaluate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--json", type=output, metavar="FILE", help="what was found, as JSON")
    parser.add_argument("--samples", type=output, metavar="FILE", help="every sample, a line of JSON each")
    asked = parser.parse_intermixed_args(arguments)
    console = Screen()
    try:
        config = read_config(Path(asked.model), asked.overrides)
        found = evaluate(config, console, asked.samples, own=_is_asked(Path(asked.model), asked.overrides, config))
    except (*BAD_INPUT, *BAD_ENGINE_INPUT) as error:
        fail(error, 2)
    except (RankError, RunnerError) as error:
        fail(error, 1)
    write_json(asked.json, _as_json(found))


def _is_asked(model: Path, overrides: Sequence[str], config: RunConfig) -> bool:
    """Tells whether the data's held-out problems are evaluated: those of a run, what the user names, or if there is nothing
    else."""
    named = any(o.lstrip("+").startswith(("data=", "data.", "recipe=")) for o in overrides)
    return named or not config.eval.sets or (model / "config.yaml").exists()


def _as_json(found: Mapping[str, Evaluation]) -> dict[str, Any]:
    sets = {name: one for name, one in found.items() if name}
    out = asdict(found[""]) | found[""].metrics() if "" in found else {}
    for name, one in sets.items():
        out |= one.metrics(f"eval/{name}")
    return out | {"sets": {name: asdict(one) for name, one in sets.items()}}


def read_config(model: Path, overrides: Sequence[str]) -> RunConfig:
    """Returns the config of the run whose folder `model` is, or the default one for a model directory, with `overrides`.
    UserError for the first that is no key or has no such value."""
    if not (model / "config.yaml").exists():
        (config,) = check([f"model.path='{model}'", "warmup.steps=0", *overrides])
        return config
    if not (model / "model").is_dir() and (model / ADAPTER).is_dir():
        raise UserError(
            f"{model} trained adapters: `python -m trainer.export {model} {model / 'model'} --merge` makes the model that is "
            f"evaluated"
        )
    if not (model / "model").is_dir():
        raise UserError(f"{model} is a run without a model: it is not finished, or had save_model=false")
    if bare := next((o for o in overrides if "=" not in o), None):
        raise UserError(f"{bare!r} is no key=value")
    try:
        values = renewed(yaml.safe_load((model / "config.yaml").read_text()))
        merged = OmegaConf.merge(values, OmegaConf.from_dotlist(list(overrides)))
        values = filled(OmegaConf.to_container(merged))  # type: ignore[arg-type]
    except (OSError, ValueError, AttributeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{model / 'config.yaml'}: {' '.join(str(error).split())}") from None
    values["model"] |= {"path": str(model / "model"), "hf": {}}
    values["adapter"] |= {"rank": 0, "path": None}  # merged
    return validate(values | {"out_dir": str(model)})


def evaluate(
    config: RunConfig, console: Screen, samples: Path | None = None, own: bool = True
) -> dict[str, Evaluation]:
    """Evaluates the model in `config.model.path`; keeps every sample in the file `samples`. Returns what was found on the sets
    of `eval.sets`, by their names, and, with `own`, under "" on the data's held-out problems."""
    assert config.model.path is not None
    choose_device(config.device, console.print, config.kernels.family)
    hosts, rollout = open_hosts(config, {}), config.rollout
    source = open_source(config, console, hosts.about if hosts else None) if own else None
    tokenizer = source.tokenizer if source else from_model(config.model.path)
    sets = open_sets(config, tokenizer, (), console, console.warn)
    kept: dict[str, Sequence[Group]] = {}
    evaluators = {}
    if source:
        environment, _, judged_by = open_environment(config, source, hosts, console.warn)
        evaluators[""] = make_evaluator(config, source, environment, judged_by, partial(_keep, kept, ""))
    for name, one in sets.items():
        environment = set_environment(config, name, one.problems, one.reward, tokenizer, hosts, console.warn)
        evaluators[name] = make_set_evaluator(
            config, name, one, tokenizer.ends, environment, partial(_keep, kept, name)
        )
    served = Served.open(
        config.model.path, config.model.leaves or 0, config.model.dtype, config.device, format=config.model.format
    )
    if source:
        console.print(
            f"{served.name}: {min(config.eval.problems, len(source.held_out)):,} of {len(source.held_out):,} held-out "
            f"problems, {config.eval.samples} sample(s) each"
        )
    for name, one in sets.items():
        for line in one.warnings:
            console.warn(f"eval.sets.{name}: {line}")
        console.print(f"{served.name}: {set_line(name, one, config.eval.problems)}")
    if config.device == "cuda":
        serving = Serving(rollout.tp, rollout.page_size, rollout.limits.rows, served.config.max_positions)
        prepare_kernels(served.config, served.dtype, serving, False, console.print, config.kernels.family)
    with Lockstep(served, rollout.engine(served.dtype, config.device), rollout.tp, rollout.threads) as ranks:
        found = {name: one(0, ranks.generate, _OwnCards(), lambda: None, console) for name, one in evaluators.items()}
    if samples:
        write_samples(samples, kept)
    return found


def _keep(kept: dict[str, Sequence[Group]], name: str, step: int, groups: Sequence[Group]) -> None:
    kept[name] = groups


class _OwnCards:
    """Cards that are shared with nobody."""

    def to_rollout(self) -> None:
        """Does nothing: the engine has them."""
