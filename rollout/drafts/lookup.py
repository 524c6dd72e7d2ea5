"""Drafts without a model: what followed the same tokens before, in the sequence itself, in its siblings in flight, or in what
was said to the same prompt earlier."""

from collections.abc import Sequence as Many

from rollout.drafts.drafter import Draft
from rollout.drafts.history import History
from rollout.drafts.suffixes import REACH, Match, Suffixes
from rollout.sequence import Sequence

OWN, SIBLING, EARLIER = "own", "sibling", "earlier"

MOST_TEXTS = 256
"""Texts of a group: of a prompt that never stops to come, later samples make a group of their own."""


class _Group:
    """The samples of one prompt that are in flight, and what was said to it earlier."""

    def __init__(self, prompt: tuple[int, ...], earlier: Many[Many[int]]) -> None:
        self.texts, self.members = Suffixes(), 0
        head = list(prompt[-REACH:])
        for completion in earlier:
            self.texts.add([*head, *completion], len(head))
        self.earlier = len(earlier)

    def join(self, sequence: Sequence) -> int:
        """Returns the number of its text. The prompt is found in the first one alone."""
        first = sequence.prompt if len(self.texts.texts) > self.earlier else 0
        self.members += 1
        return self.texts.add(sequence.tokens, first)

    def draft(self, number: int, most: int) -> Draft | None:
        """Follows the best match. One in the text itself may overlap with its end: it then repeats."""
        tokens = self.texts.texts[number]
        match = self.texts.find(tokens)
        if match is None:
            return None
        text, place = self.texts.texts[match.text], match.place
        out = list(text[place : place + most])
        if match.text == number:
            period = len(tokens) - place
            while len(out) < most:
                out.append(out[-period])
        return Draft(out, self._source(match, number), match.length)

    def _source(self, match: Match, number: int) -> str:
        if match.text < self.earlier:
            return EARLIER
        return OWN if match.text == number else SIBLING


class Lookup:
    """Drafts from texts. What ends is kept for later requests of the same prompt, whatever the weights are then."""

    def __init__(self, history: History | None = None) -> None:
        self.history = history or History()
        self._groups: dict[int, _Group] = {}  # by the prompt's hash: a wrong one costs a wrong guess
        self._joined: dict[
            Sequence, tuple[_Group, int]
        ] = {}  # those in flight: their group, and the number of their text

    def draft(self, sequences: Many[Sequence], most: int) -> list[Draft | None]:
        """Returns drafts, as `Drafter.draft`. Of sequences not met for a while it reads first what they said since."""
        self._forget_ended()
        places = [self._joined.get(sequence) or self._join(sequence) for sequence in sequences]
        for group, number in places:
            group.texts.extend(number)
        return [group.draft(number, most) for group, number in places]

    def ended(self, sequence: Sequence) -> None:
        """Keeps what a sample said."""
        self.history.add(sequence.request.prompt_ids, sequence.tokens[sequence.prompt :])

    def _join(self, sequence: Sequence) -> tuple[_Group, int]:
        prompt = sequence.request.prompt_ids
        key = hash(prompt)
        group = self._groups.get(key)
        if group is None or len(group.texts.texts) >= MOST_TEXTS:
            group = self._groups[key] = _Group(prompt, self.history.of(prompt))
        self._joined[sequence] = group, group.join(sequence)
        return self._joined[sequence]

    def _forget_ended(self) -> None:
        """A group goes with the last of its samples."""
        ended = [s for s in self._joined if s.ended]
        for sequence in ended:
            group, _ = self._joined.pop(sequence)
            group.members -= 1
        if ended:
            self._groups = {key: group for key, group in self._groups.items() if group.members}
