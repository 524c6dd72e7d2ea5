"""Plays conversations of several turns with tools, which the methods of an object are: TRL's `environment_factory`.

Every conversation goes on as soon as its own tools have answered, while the engines decode others. What becomes of it depends
on its problem, seed, weights and environment, and not on who was first.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rl.config import RunConfig
from rl.data import Problem
from rl.environments.conversation import Conversation, Played
from rl.environments.environment import Generate
from rl.environments.formats import FORMATS, Read, chosen, parameters
from rl.environments.hosts import Hosts, Seat
from rl.environments.judging import Judged, Once
from rl.environments.turns import Turns, open_turns
from rl.environments.worker import END, RESET, TEACH, Action, Result
from rl.errors import UserError
from rl.rewards.reward import Reward
from rl.samples import Transcript
from rollout.sampling import Completion, Request, SamplingParams
from rollout.tokenizer import Tokenizer

_MOMENT = 0.005
"""Seconds without an answer after which the engines go on: those of quick tools come together, in one batch."""


@dataclass(frozen=True, kw_only=True)
class Tools(Judged):
    """Plays conversations with objects of one factory, and judges them."""

    hosts: Hosts
    turns: Turns
    read: Read  # the calls in a completion
    max_turns: int
    max_tokens: int  # of a conversation beside its problem's own prompt

    @property
    def teaches(self) -> bool:
        """Says whether the environment shows what to write, for a warm start."""
        return self.hosts.about.teaches

    def play(self, requests: Sequence[Request], generate: Generate, problems: Sequence[Problem]) -> list[Transcript]:
        """Plays the conversation that begins with each request; the prompt is the environment's to write."""
        talk = _Talk(self, requests, problems)
        try:
            generate((), talk)
        finally:
            talk.leave()
        return list(talk.played())

    def demonstrate(self, problems: Sequence[Problem], sampling: SamplingParams) -> list[Transcript]:
        """Plays a conversation about each problem in which the environment's `teach` says what the policy writes, in turns of
        as many tokens as `sampling` has at the most."""
        requests = [Request(i, problem.prompt_ids, sampling) for i, problem in enumerate(problems)]
        talk = _Talk(self, requests, problems, taught=True)
        try:
            talk.requests(idle=True)  # none: the teacher answers in the policy's place
        finally:
            talk.leave()
        return list(talk.played())


class _Talk:
    """Follows conversations through the engines and the hosts (`rollout.replies.Replies`)."""

    def __init__(
        self, of: Tools, requests: Sequence[Request], problems: Sequence[Problem], taught: bool = False
    ) -> None:
        self._of, self._taught, hosts = of, taught, of.hosts
        each = len(requests) // len(problems)
        self._all = [Conversation(r, problems[i // each], hosts.seat()) for i, r in enumerate(requests)]
        self._by_id = {} if taught else {c.first.id: c for c in self._all}
        self._by_seat: dict[Seat, Conversation] = {c.seat: c for c in self._all}
        self._asked = len(self._all)  # conversations that wait for their host
        self._ready: list[Request] = []
        for conversation in self._all:
            hosts.ask(conversation.seat, [Action(RESET, arguments=conversation.row())])

    def take(self, done: Sequence[Completion]) -> None:
        """Hears of completions: their calls are made, or the conversation ends."""
        for completion in done:
            self._completed(self._by_id[completion.request_id], completion)

    def requests(self, idle: bool) -> list[Request]:
        """Returns the requests of conversations that can go on; see `Replies`."""
        while self._asked:
            wanted = idle and not self._ready
            heard = self._of.hosts.answers(1.0 if wanted else _MOMENT)
            for seat, results in heard:
                self._answered(self._by_seat[seat], seat.done[-1][0].what, results)
            if not heard and not wanted:
                break
        ready, self._ready = self._ready, []
        return ready

    def played(self) -> list[Played]:
        """Returns what each conversation came to, in their order."""
        return [conversation.played() for conversation in self._all]

    def leave(self) -> None:
        """Forgets the conversations that have not ended, where something else has."""
        for seat in self._by_seat if self._asked else ():
            self._of.hosts.leave(seat)

    def _ask(self, conversation: Conversation, actions: Sequence[Action]) -> None:
        self._asked += 1
        self._of.hosts.ask(conversation.seat, actions)

    def _answered(self, conversation: Conversation, what: str, results: list[Result]) -> None:
        """Goes on with a conversation whose host has answered."""
        self._asked -= 1
        last = results[-1]
        if last.error:
            self._failed(conversation, last.error)
        if what == RESET:
            conversation.pieces.append(self._prompt(conversation, last.value or ""))
            self._next(conversation)
        elif what == TEACH:
            self._completed(conversation, self._written(conversation, last.value or ""))
        elif what == END:
            conversation.reward, conversation.state = last.value or (None, {})
            self._of.hosts.leave(conversation.seat)
        elif conversation.error:
            self._of.hosts.leave(conversation.seat)
        else:
            self._go_on(conversation, results)

    def _failed(self, conversation: Conversation, how: str) -> None:
        conversation.error = how
        self._of.failed(conversation.problem, how, always=self._taught)

    def _prompt(self, conversation: Conversation, told: str) -> tuple[int, ...]:
        prompt = self._of.turns.prompt(conversation.problem, told)
        if len(prompt) >= self._limit(conversation):
            raise UserError(
                f"environment.max_tokens={self._of.max_tokens}: the tools' descriptions and what reset adds to the prompt of "
                f"problem {conversation.problem.id!r} leave no token for an answer: raise it"
            )
        return prompt

    def _limit(self, conversation: Conversation) -> int:
        return len(conversation.problem.prompt_ids) + self._of.max_tokens

    def _next(self, conversation: Conversation) -> None:
        """Asks for the next completion."""
        if self._taught:
            self._ask(conversation, [Action(TEACH)])
        else:
            self._ready.append(conversation.request(self._limit(conversation)))

    def _written(self, conversation: Conversation, text: str) -> Completion:
        """Makes a completion of what the teacher writes."""
        request = conversation.request(self._limit(conversation))
        ids = self._of.tokenizer.completion(text)
        kept = ids[: request.sampling.max_new_tokens]
        reason = "stop" if kept == ids else "length"
        return Completion(request.id, kept, (0.0,) * len(kept), reason, 0, request.sampling)  # type: ignore[arg-type]

    def _completed(self, conversation: Conversation, completion: Completion) -> None:
        """Takes a completion: makes its calls, or ends the conversation."""
        conversation.pieces.append(completion)
        text = self._text(completion)
        conversation.messages.append({"role": "assistant", "content": text})
        if conversation.error:  # of reset: there is nothing to talk to
            self._of.hosts.leave(conversation.seat)
            return
        ended = completion.finish_reason != "stop"
        conversation.calls = [] if ended else self._of.read(text, parameters(self._of.hosts.about.tools))
        if not conversation.calls or conversation.turns >= self._of.max_turns:
            conversation.counts["cut"] = float(ended or bool(conversation.calls))
            self._end(conversation)
        elif actions := conversation.actions():
            self._ask(conversation, actions)
        else:
            self._go_on(conversation, [])

    def _text(self, completion: Completion) -> str:
        """Returns what was written, with tags that are special tokens, and without the token that ends it."""
        ids, tokenizer = completion.token_ids, self._of.tokenizer
        return tokenizer.decode(ids[:-1] if ids and ids[-1] in tokenizer.ends else ids, special=True)

    def _go_on(self, conversation: Conversation, results: Sequence[Result]) -> None:
        """Writes the answers of tools and asks for what follows, unless there is no room for that."""
        answers = self._of.turns.answers(conversation.answered(results))
        if len(conversation.ids) + len(answers) >= self._limit(conversation):
            conversation.counts["cut"] = 1.0
            self._end(conversation)
            return
        conversation.pieces.append(answers)
        self._next(conversation)

    def _end(self, conversation: Conversation) -> None:
        if self._taught:
            self._of.hosts.leave(conversation.seat)
        else:
            self._ask(conversation, [Action(END)])


def open_tools(
    config: RunConfig,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    reward: Reward | None,
    hosts: Hosts,
    say: Callable[[str], None],
) -> Tools:
    """Makes an environment for `problems`; UserError for a template or a format that cannot carry it. `say` tells of the first
    conversation that is left out."""
    section = config.environment
    own = getattr(config.data, "tools", None) or "tools"
    if owner := next((p for p in problems if isinstance(p.record, Mapping) and p.record.get(own)), None):
        raise UserError(
            f"environment.name=tools: problem {owner.id!r} has tools of its own (its field {own}), which nobody would call: "
            f"drop the field, or the environment"
        )
    turns = open_turns(config, tokenizer, hosts.about.tools)
    return Tools(
        tokenizer=tokenizer,
        name=hosts.about.name,
        rewards=hosts.about.rewards,
        hosts=hosts,
        turns=turns,
        read=FORMATS[chosen(section.format, turns.template)],
        reward=reward,
        max_turns=section.max_turns,
        max_tokens=section.max_tokens,
        drop=Once(say) if section.errors == "drop" else None,
    )
