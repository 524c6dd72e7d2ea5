"""One sample as a client sees it grow: its text, cut before what stopped it, and its tokens."""

from rollout.sampling import Completion, Request, Token
from rollout.source import Source
from rollout.text import TextStream


class Sample:
    """Fed with the events of one sample; what it says at the end is what a client that did not stream is told."""

    def __init__(self, source: Source, request: Request, special: bool = False, keep_stop: bool = False) -> None:
        """`special`: special tokens are text; `keep_stop`: so is what stopped it."""
        self.stops, self.keep_stop = frozenset(request.sampling.stop_ids), keep_stop
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        decode = source.decode_special if special else source.decode
        self.stream = TextStream(decode, request.sampling.stop, keep_stop) if decode else None
        self.shown = ""  # text that may be shown now
        self.told = 0  # tokens that were told to the client

    def token(self, token: Token) -> str:
        """What it adds to the shown text."""
        self.ids.append(token.id)
        self.logprobs.append(token.logprob)
        if self.stream is None or (token.id in self.stops and not self.keep_stop):
            return ""
        self.stream.push(token.id)
        return self._show(self.stream.take())

    def end(self) -> str:
        if self.stream is None:
            return ""
        self.stream.finish()
        return self._show(self.stream.rest())

    def _show(self, text: str) -> str:
        self.shown += text
        return text

    def whole(self, completion: Completion) -> "Sample":
        """Itself, at its end."""
        for i, logprob in zip(completion.token_ids, completion.logprobs, strict=True):
            self.token(Token(completion.request_id, completion.sample, i, logprob, completion.version))
        self.end()
        return self
