"""Opens the problems that a config names."""

from typing import TYPE_CHECKING

from rl.config import ReasoningGymSection, RunConfig
from rl.data import tokenizer as tokenizers
from rl.data.problem import Source
from rl.data.procedural import Drawn
from rl.data.question_answer import Questions
from rl.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


def open_source(config: RunConfig, console: "Console | None" = None) -> Source:
    """Says on `console` what takes long. Raises UserError for a task that does not exist, a pattern that keeps nothing, a
    template that makes prompts alike, or a file with a bad line."""
    own = tokenizers.from_model(config.model.path) if config.model.path else None
    taught = config.warmup.steps > 0
    if isinstance(config.data, ReasoningGymSection):
        drawn = Drawn(config.data, config.seed, taught or not own, console)
        source = drawn.source(own or drawn.tokenizer())
    else:
        questions = Questions(config.data, bool(config.reward), taught, console)
        source = questions.source(own or questions.tokenizer(), made=not own)
    for problem in (*source.train, *source.held_out):
        if not problem.prompt or not problem.prompt_ids:  # ids there may be: a begin of text
            raise UserError(f"the prompt of problem {problem.id!r} is empty: data.prompt={config.data.prompt!r}")
    if not source.train or not source.held_out:
        hint = "give more problems" if not source.left_out else "raise data.max_prompt_tokens"
        raise UserError(
            f"the data leaves {len(source.train)} problems to train on and {len(source.held_out)} held out"
            f"{left_out(source)}: {hint}"
        )
    return source


def left_out(source: Source) -> str:
    """Says how many problems were left out because their prompts are too long."""
    return f", {source.left_out} left out for prompts above data.max_prompt_tokens" if source.left_out else ""
