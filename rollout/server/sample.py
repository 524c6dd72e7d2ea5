"""One sample as a client sees it grow: its text, cut before what stopped it, and its tokens."""

from rollout.sampling import Completion, Request, Token, Top
from rollout.source import Source
from rollout.text import TextStream


class Sample:
    """Gathers the events of one sample; what it says at the end is what a client that did not stream is told."""

    def __init__(self, source: Source, request: Request, special: bool = False, keep_stop: bool = False) -> None:
        """`special`: special tokens are text; `keep_stop`: so is what stopped it."""
        self.request = request
        self.stops, self.keep_stop = frozenset(request.sampling.stop_ids), keep_stop
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[Top] = []
        self.offsets: list[int] = []  # of each token in the text
        self.pieces: list[str] = []  # of the text that may be shown
        decode = source.decode_special if special else source.decode
        self.stream = TextStream(decode, request.sampling.stop, keep_stop) if decode else None
        self.told = 0, 0  # pieces and tokens that `news` has given
        self.done: Completion | None = None
        self.version = -1  # of the weights that sampled the last token

    @property
    def text(self) -> str:
        """Joins all text that may be shown so far."""
        return "".join(self.pieces)

    def hear(self, event: Token | Completion) -> None:
        """Takes the next token, or the completion that ends the sample."""
        self.version = event.version
        if isinstance(event, Completion):
            self.done = event
            if self.stream is not None:
                self.pieces.append(self.stream.finish())
        else:
            self._add(event.id, event.logprob, event.top)

    def _add(self, token: int, logprob: float, top: Top) -> None:
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.top.append(top)
        self.offsets.append(self.stream.length if self.stream else 0)
        if self.stream is not None and (token not in self.stops or self.keep_stop):
            self.pieces.append(self.stream.push(token))

    def whole(self, completion: Completion) -> "Sample":
        """Returns itself, fed with the whole completion."""
        tops = completion.top or ((),) * len(completion.token_ids)
        for added in zip(completion.token_ids, completion.logprobs, tops, strict=True):
            self._add(*added)
        self.hear(completion)
        return self

    @property
    def fresh(self) -> bool:
        """Says whether there is news: text, or where there is none tokens."""
        pieces, tokens = self.told
        return any(self.pieces[pieces:]) or (self.stream is None and len(self.ids) > tokens)

    def news(self) -> tuple[str, slice]:
        """Returns the text and the tokens since the last call."""
        pieces, tokens = self.told
        self.told = len(self.pieces), len(self.ids)
        return "".join(self.pieces[pieces:]), slice(tokens, len(self.ids))
