"""`python -m rl.evaluate MODEL [--json FILE] [--samples FILE] [key=value ...]`: what a model earns on held-out problems.

MODEL: a Hugging Face model directory, or the folder of a run, whose model is evaluated as the run did. The keys are those of
`rl.train`, on top of its defaults or of the run's config: data, reward, eval.problems, eval.samples, eval.temperature,
rollout.tp, rollout.max_new_tokens, seed, device. No trainer and no Ray are started. Exit code 1: the engine failed; 2: bad
input.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kernels.host.command import Parser, fail, output
from kernels.model.ahead import Serving
from kernels.model.ahead import prepare as prepare_kernels
from rl.compose import check
from rl.config import RunConfig, validate
from rl.data import open_source
from rl.environments.choice import open_environment
from rl.environments.tools import open_hosts
from rl.errors import BAD_INPUT, UserError
from rl.evaluation.evaluator import make_evaluator
from rl.evaluation.measures import Evaluation
from rl.evaluation.samples import write_samples
from rl.keys import renewed
from rl.run.screen import Screen
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
        found = evaluate(read_config(Path(asked.model), asked.overrides), console, asked.samples)
    except (*BAD_INPUT, *BAD_ENGINE_INPUT) as error:
        fail(error, 2)
    except (RankError, RunnerError) as error:
        fail(error, 1)
    if asked.json:
        asked.json.write_text(json.dumps(asdict(found) | found.metrics(), indent=1) + "\n")


def read_config(model: Path, overrides: Sequence[str]) -> RunConfig:
    """Returns the config of the run whose folder `model` is, or the default one for a model directory, with `overrides`.
    UserError for the first that is no key or has no such value."""
    if not (model / "config.yaml").exists():
        (config,) = check([f"model.path='{model}'", "warmup.steps=0", *overrides])
        return config
    if not (model / "model").is_dir():
        raise UserError(f"{model} is a run without a model: it is not finished, or had save_model=false")
    if bare := next((o for o in overrides if "=" not in o), None):
        raise UserError(f"{bare!r} is no key=value")
    try:
        values = renewed(yaml.safe_load((model / "config.yaml").read_text()))
        merged = OmegaConf.merge(values, OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged)  # type: ignore[assignment]
    except (OSError, ValueError, AttributeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{model / 'config.yaml'}: {' '.join(str(error).split())}") from None
    values["model"] |= {"path": str(model / "model"), "hf": {}}
    return validate(values | {"out_dir": str(model)})


def evaluate(config: RunConfig, console: Screen, samples: Path | None = None) -> Evaluation:
    """Evaluates the model in `config.model.path`; keeps every sample in the file `samples`."""
    assert config.model.path is not None
    hosts = open_hosts(config, {})
    source, rollout = open_source(config, console, hosts.about if hosts else None), config.rollout
    environment, _, judged_by = open_environment(config, source, hosts, console.warn)
    served = Served.open(config.model.path, config.model.leaves or 0, config.model.dtype, config.device)
    console.print(
        f"{served.name}: {min(config.eval.problems, len(source.held_out)):,} of {len(source.held_out):,} held-out problems, "
        f"{config.eval.samples} sample(s) each"
    )
    if config.device == "cuda":
        serving = Serving(rollout.tp, rollout.page_size, rollout.max_running, served.config.max_positions)
        prepare_kernels(served.config, served.dtype, serving, False, console.print)
    evaluator = make_evaluator(
        config,
        source,
        environment,
        judged_by,
        keep=lambda step, groups: write_samples(samples, groups) if samples else None,
    )
    with Lockstep(served, rollout.engine(served.dtype, config.device), rollout.tp, rollout.threads) as ranks:
        return evaluator(0, ranks.generate, _OwnCards(), lambda: None, console)


class _OwnCards:
    """Cards that are shared with nobody."""

    def to_rollout(self) -> None:
        """Does nothing: the engine has them."""
