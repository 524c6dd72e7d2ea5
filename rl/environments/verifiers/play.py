"""Plays episodes of an environment of the package `verifiers`: its client asks the run's engines, ids in, ids out.

What a client asks is a prompt of ids and the seed of its sample, and by this seed it is known whose it is. A prompt has to
begin with all tokens so far: what stands between two completions is what the environment says, on which nobody trains. Which
tokens these are depends on the task, the seed, the weights and the environment, and not on who was first.
"""

import queue
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rl.config import RunConfig
from rl.data import Problem
from rl.environments.conversation import Outcome, Played
from rl.environments.environment import Generate
from rl.environments.formats import chosen
from rl.environments.judging import Judged, Once
from rl.environments.turns import open_turns
from rl.environments.verifiers.host import Episode, Part, Scene, VerifiersHost
from rl.environments.verifiers.line import NAME, Asked, Line, refusal
from rl.errors import UserError
from rl.model import model_config
from rl.rewards.process import JudgeError
from rl.rewards.reward import Reward
from rl.samples import Transcript, completions
from rollout.sampling import Completion, Request, SamplingParams
from rollout.source import Source as Served
from rollout.tokenizer import Tokenizer

_TOGETHER = 256  # episodes at a time: each may have processes of its own, for tools
_LOOK = 0.05  # seconds between two looks at what is new, where the engines have nothing to do
_MOMENT = 0.005  # seconds without a request after which they go on: those that come together are in one batch


@dataclass(frozen=True, kw_only=True)
class Verifiers(Judged):
    """Plays episodes, one for each sample, and judges them by what the package says they earned."""

    host: VerifiersHost
    line: Line
    scene: Scene
    timeout: float  # seconds without a request to the policy

    def play(self, requests: Sequence[Request], generate: Generate, problems: Sequence[Problem]) -> list[Transcript]:
        """Plays an episode for each request, whose sampling it has; the prompt is the environment's to write."""
        self.line.open()
        talk = _Talk(self, requests, problems)
        try:
            generate((), talk)
        finally:
            talk.leave()
        return list(talk.played())


@dataclass(eq=False)
class Act:
    """Holds one episode while it is under way."""

    first: Request
    problem: Problem
    longest: int  # tokens of all of it
    pieces: list[tuple[int, ...] | Completion] = field(default_factory=list)
    ids: tuple[int, ...] = ()  # all tokens so far
    prompted: int = 0  # how many of them stood before the last completion
    asked: Asked | None = None  # what is being sampled
    since: float = 0.0  # when the environment was last answered
    wrong: str = ""  # what it asked that cannot be trained on
    episode: Episode | None = None  # how it ended

    def request(self, asked: Request) -> Request:
        """Returns what the engines are asked. ValueError where what stands there is no continuation of what there was."""
        ids = asked.prompt_ids
        if self.asked:
            raise ValueError("asked the policy twice at a time: one conversation is trained on")
        if self.pieces and ids == self.ids[: self.prompted]:  # the client tries again
            self.pieces.pop()
            self.ids = ids
        if ids[: len(self.ids)] != self.ids:
            raise ValueError(
                "wrote its conversation anew, or began another: one is trained on, of which every turn follows the last"
            )
        if len(ids) > len(self.ids):
            self.pieces.append(ids[len(self.ids) :])
        self.ids, self.prompted = ids, len(ids)
        most = min(asked.sampling.max_new_tokens, self.longest - len(ids))
        return replace(self.first, prompt_ids=ids, sampling=replace(asked.sampling, max_new_tokens=most))

    def take(self, completion: Completion) -> None:
        """Adds what was sampled, and tells who asked."""
        self.pieces.append(completion)
        self.ids += completion.token_ids
        self.since = time.monotonic()
        asked, self.asked = self.asked, None
        if asked:
            asked.sink(replace(completion, request_id=asked.request.id))

    @property
    def turns(self) -> int:
        """Counts what was sampled so far."""
        return len(completions(tuple(self.pieces)))

    def against(self, episode: Episode) -> str:
        """Says what speaks against an episode: its record is to hold the very tokens and log-probs that were sampled."""
        if episode.error or self.wrong or not self.turns:
            return episode.error or self.wrong or "ended before it asked the policy"
        if len(episode.branches) != 1:
            return f"came to {len(episode.branches)} conversations: one is trained on"
        (branch,) = episode.branches
        here = [token for piece in self.pieces for token in _tokens(piece)]
        rows = zip(branch.token_ids, branch.sampled, branch.logprobs, strict=True)
        there = [(i, logprob if sampled else None) for i, sampled, logprob in rows]
        if here == there:
            return ""
        at = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), min(len(here), len(there)))
        return (
            f"recorded other tokens or log-probs than there were, from place {at} of {len(here)} on: {here[at : at + 1]} here, "
            f"{there[at : at + 1]} there (token, and its log-prob if it was sampled)"
        )

    def played(self, full: bool) -> Played:
        """Returns what it came to. `full`: it had no room for another turn."""
        episode = self.episode or Episode(error="was not played to its end")
        while not isinstance(self.pieces[-1], Completion):  # what nothing was sampled after
            self.pieces.pop()
        tools = [message for message in episode.messages if message.get("role") == "tool"]
        counts = {"turns": float(self.turns), "tool_calls": float(len(tools)), "cut": float(episode.cut or full)}
        counts = {**episode.metrics, **counts, "errors": float(bool(episode.error))}
        return Played.of(
            self.pieces, Outcome(tuple(map(dict, episode.messages)), episode.error, episode.reward, {}, counts)
        )


def _tokens(piece: tuple[int, ...] | Completion) -> list[tuple[int, float | None]]:
    """Returns tokens, each with its log-prob if it was sampled."""
    if isinstance(piece, Completion):
        return list(zip(piece.token_ids, piece.logprobs, strict=True))
    return [(i, None) for i in piece]


class _Talk:
    """Follows episodes through the engines and the package (`rollout.replies.Replies`)."""

    def __init__(self, of: Verifiers, requests: Sequence[Request], problems: Sequence[Problem]) -> None:
        self._of, each, longest = of, len(requests) // len(problems), of.line.inbox.longest
        self._all = [Act(r, problems[i // each], longest) for i, r in enumerate(requests)]
        self._by_seed = {act.first.sampling.seed: act for act in self._all}
        self._by_id = {act.first.id: act for act in self._all}
        self._waiting = deque(self._all)
        self._playing: set[Act] = set()
        self._ready: list[Request] = []
        of.line.inbox.full.clear()
        self._begin()

    def take(self, done: Sequence[Completion]) -> None:
        """Hears of completions, and hands them to those who asked."""
        for completion in done:
            self._by_id[completion.request_id].take(completion)

    def requests(self, idle: bool) -> list[Request]:
        """Returns the requests that clients have sent; see `Replies`."""
        inbox = self._of.line.inbox.waiting
        while True:
            self._hear()
            wanted = idle and not self._ready and bool(self._playing)
            try:
                self._admit(inbox.get(timeout=_LOOK if wanted else _MOMENT))
            except queue.Empty:
                if not wanted:
                    ready, self._ready = self._ready, []
                    return ready

    def played(self) -> list[Played]:
        """Returns what each episode came to, in their order."""
        full = self._of.line.inbox.full
        return [act.played(act.first.sampling.seed in full) for act in self._all]

    def leave(self) -> None:
        """Ends the episodes that have not ended, where something else has."""
        for act in self._playing:
            self._of.host.cancel(act.first.id)

    def _begin(self) -> None:
        """Begins as many episodes as may be under way."""
        parts = []
        while self._waiting and len(self._playing) < _TOGETHER:
            act = self._waiting.popleft()
            act.since = time.monotonic()
            self._playing.add(act)
            parts.append(Part(act.first.id, _number(act.problem), words(act.first.sampling)))
        if parts:
            self._of.host.play(self._of.scene, parts)

    def _admit(self, asked: Asked) -> None:
        act = self._by_seed.get(asked.request.sampling.seed)
        if act is None or act.episode:
            asked.sink(refusal("this seed is of no sample that is being played: the environment is not to set its own"))
            return
        try:
            self._ready.append(act.request(asked.request))
            act.asked = asked
        except ValueError as error:
            act.wrong = act.wrong or str(error)
            asked.sink(refusal(act.wrong))

    def _hear(self) -> None:
        """Hears of episodes that have ended, and ends those that take too long."""
        if not self._playing:
            return
        try:
            for number, episode in self._of.host.heard(0.0):
                if (act := self._by_id[number]) in self._playing:
                    self._ended(act, episode)
        except JudgeError as error:
            for act in list(self._playing):
                self._ended(act, Episode(error=str(error)))
        limit, now = self._of.timeout, time.monotonic()
        for act in [a for a in self._playing if not a.asked and now - a.since > limit]:
            self._of.host.cancel(act.first.id)
            self._ended(act, Episode(error=f"took more than {limit:g} s (environment.timeout; a clock decides that)"))
        self._begin()

    def _ended(self, act: Act, episode: Episode) -> None:
        self._playing.discard(act)
        if wrong := act.against(episode):
            episode = Episode(error=wrong)
            self._of.failed(act.problem, wrong)
        act.episode = episode
        if not act.turns and not act.asked:  # a sequence of a batch has at least a token that was sampled
            act.pieces = [act.problem.prompt_ids]
            sampling = replace(act.first.sampling, max_new_tokens=1)
            self._ready.append(replace(act.first, prompt_ids=act.problem.prompt_ids, sampling=sampling))


def words(sampling: SamplingParams) -> Mapping[str, Any]:
    """Returns sampling parameters in the client's words, but for the ids that end a completion: it has its own."""
    filters = {"top_k": sampling.top_k, "top_p": sampling.top_p, "min_p": sampling.min_p}
    return {
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        "max_tokens": sampling.max_new_tokens,
        **filters,
    }


def _number(problem: Problem) -> int:
    return int(problem.record["number"])


def open_verifiers(
    config: RunConfig,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    reward: Reward | None,
    host: VerifiersHost,
    say: Callable[[str], None],
) -> Verifiers:
    """Makes the environment for `problems`, which are its tasks by number; UserError for a model that has no chat template, or
    data of another kind. `say` tells of the first episode that is left out."""
    section = config.environment
    for problem in problems:
        if _number(problem) >= host.tasks:
            raise UserError(f"data.problems={_number(problem) + 1} or more: {host.about.name} has {host.tasks} tasks")
    turns = open_turns(config, tokenizer, ())
    if config.model.path is None or not tokenizer.chat_template:
        raise UserError(
            "environment.name=verifiers talks to a model by its chat template: set model.path=DIR to one that has it"
        )
    folder, template = str(config.model.path), str(tokenizer.chat_template)
    model = model_config(config, len(tokenizer))
    longest = max(len(p.prompt_ids) for p in problems) + section.max_tokens
    served = Served(NAME, replace(model, max_positions=longest), None, config.dtype, tokenizer, tokenizer.ends)
    line = Line(served, longest)
    return Verifiers(
        tokenizer=tokenizer,
        name=host.about.name,
        reward=reward,
        drop=Once(say) if section.errors == "drop" else None,
        host=host,
        line=line,
        scene=Scene(line.url, line.key, folder, template, {}, chosen(section.format, turns.template)),
        timeout=section.timeout,
    )
