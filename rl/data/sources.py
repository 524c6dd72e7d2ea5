"""Opens the problems that a config names."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rl.config import RunConfig
from rl.data import tokenizer as tokenizers
from rl.data.mixture import Mixture, Unread
from rl.data.numbered import Numbered
from rl.data.problem import Problem, Source
from rl.data.procedural import Drawn
from rl.data.question_answer import Questions
from rl.data.section import AnyData, DatasetSection, MixtureSection, NumberedSection, ReasoningGymSection
from rl.errors import UserError
from rl.rewards.section import RewardSection, reads_answers
from rollout.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.console import Console

    from rl.environments.worker import About


def open_source(config: RunConfig, console: "Console | None" = None, talk: "About | None" = None) -> Source:
    """Says on `console` what takes long. `talk`: the environment that the problems are for. Raises UserError for a task that
    does not exist, a pattern that keeps nothing, a template that makes prompts alike, or a file with a bad line."""
    own = tokenizers.from_model(config.model.path) if config.model.path else None
    unread = _read(config, own is None, talk, console)
    source = unread.source(own or unread.tokenizer(), made=own is None)
    for problem in (*source.train, *source.held_out):
        if not problem.prompt or not problem.prompt_ids:  # ids there may be: a begin of text
            raise UserError(f"the prompt of problem {problem.id!r} is empty: {_template(config.data, problem)}")
    if not source.train or not source.held_out:
        hint = "give more problems" if not source.left_out else "raise data.max_prompt_tokens"
        raise UserError(
            f"the data leaves {len(source.train)} problems to train on and {len(source.held_out)} held out"
            f"{left_out(source)}: {hint}"
        )
    return source


def open_set(
    config: RunConfig,
    section: ReasoningGymSection | DatasetSection,
    rewards: Sequence[RewardSection],
    tokenizer: Tokenizer,
    console: "Console | None" = None,
) -> Source:
    """Reads a set that a run is evaluated on beside its own held-out problems; nothing is trained on. UserError as of
    `open_source`, and for a text that `tokenizer`, which is the run's, does not know."""
    made = config.model.path is None
    unread: Unread
    if isinstance(section, ReasoningGymSection):
        unread = Drawn(section, config.seed, False, console)
    else:
        unread = Questions(section, not reads_answers(rewards), False, console, trained=False)
    source = replace(unread.source(tokenizer, made), train=())
    unknown = tokenizer.backend.token_to_id(tokenizers.UNKNOWN) if made else None
    for problem in source.held_out:
        if not problem.prompt or not problem.prompt_ids:
            raise UserError(f"the prompt of problem {problem.id!r} is empty: {_template(section, problem)}")
        if unknown is not None and unknown in problem.prompt_ids:
            raise UserError(
                f"the prompt of problem {problem.id!r} has characters that the tokenizer, which is made from the data, does "
                f"not know: set model.path=DIR, or mix such problems into the data"
            )
    if not source.held_out:
        few = (
            ""
            if source.left_out
            else f": of {getattr(section, 'problems', 0):,} problems none is held out: raise problems"
        )
        raise UserError(f"no problem is left{left_out(source)}{few}")
    return source


def _read(config: RunConfig, made: bool, talk: "About | None", console: "Console | None") -> Unread:
    """Reads what the config names; `made`: a tokenizer will be made from it."""
    data, taught = config.data, config.warmup.steps > 0 and config.warmup.kind == "sft"
    taught = taught and not (talk and talk.teaches)
    judged = bool(talk and talk.rewards) and not config.reward

    def one(section: ReasoningGymSection | DatasetSection) -> Unread:
        if isinstance(section, ReasoningGymSection):
            return Drawn(section, config.seed, taught or made, console, talk is not None)
        return Questions(section, judged or not reads_answers(config.reward), taught, console)

    def named(name: str, section: ReasoningGymSection | DatasetSection) -> Unread:
        try:
            return one(section)
        except UserError as error:
            raise UserError(f"data.sources.{name}: {error}") from None

    if isinstance(data, MixtureSection):
        return Mixture(data, {name: named(name, section) for name, section in data.sources.items()})
    return Numbered(data, taught) if isinstance(data, NumberedSection) else one(data)


def _template(data: AnyData, problem: Problem) -> str:
    """Names the template that a prompt was made by."""
    if isinstance(data, MixtureSection):
        name = problem.id.partition("/")[0]
        return f"data.sources.{name}.prompt={data.sources[name].prompt!r}"
    return f"data.prompt={data.prompt!r}"


def left_out(source: Source) -> str:
    """Says how many problems were left out because their prompts are too long."""
    return f", {source.left_out} left out for prompts above data.max_prompt_tokens" if source.left_out else ""
