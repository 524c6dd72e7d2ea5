"""Serves requests that come and go: every engine does a few steps at a time, and hears of what is new between them.

All ranks of an engine are told the same requests between the same steps, so they stay in step without talking; another engine,
or a tool that takes its time, is waited for by nobody.
"""

from collections.abc import Sequence

from rl.cluster.calls import Calls, first, gather
from rl.cluster.watch import Rank
from rollout.replies import STEPS, Replies
from rollout.sampling import Request


class Streams:
    """Drives the engines of a fleet through requests and what follows them."""

    def __init__(self, engines: Sequence[Sequence[Rank]], patience: float) -> None:
        """`patience`: seconds that a rank may be stopped, as of `gather`."""
        self._engines, self._patience = engines, patience
        self._queued: list[list[Request]] = [[] for _ in engines]  # not told to the engine yet
        self._running = [0] * len(engines)  # samples that it has been told of and that have not ended
        self._calls: dict[int, Calls] = {}  # of engines that are at work
        self._prompts: dict[tuple[int, ...], int] = {}  # where a prompt is, for the prefix cache
        self._home: dict[int, int] = {}  # where a conversation is, by its request's id

    def converse(self, requests: Sequence[Request], replies: Replies) -> None:
        """Serves all of them, until none is left and none will come."""
        self._queue(requests)
        while True:
            self._queue(replies.requests(idle=not (any(self._queued) or any(self._running))))
            self._send()
            if not self._calls:
                return
            busy = list(self._calls)
            chosen = busy[first([self._calls[i] for i in busy], self._patience)]
            done = gather(self._calls.pop(chosen), patience=self._patience)[0]
            self._running[chosen] -= len(done)
            replies.take(done)

    def _queue(self, requests: Sequence[Request]) -> None:
        """Gives each request to the engine that has its conversation, else its prompt, else to the next one."""
        for request in requests:
            prompt = request.prompt_ids
            if request.id not in self._home:
                self._home[request.id] = self._prompts.setdefault(prompt, len(self._prompts) % len(self._engines))
            self._queued[self._home[request.id]].append(request)

    def _send(self) -> None:
        """Lets every engine that is not at work, and has work, do its next steps."""
        for i, ranks in enumerate(self._engines):
            news = self._queued[i]
            if i not in self._calls and (news or self._running[i]):
                self._calls[i] = {rank.actor.advance.remote(news, STEPS): rank for rank in ranks}
                self._running[i] += sum(request.sampling.n for request in news)
                self._queued[i] = []
