"""The environment of `+recipe=calculator`: the sums of the main job, with a tool that computes them."""

import re

from rl.environments.games.draw import draw


class Calculator:
    """Has the problem's verifier judge the last text; whether the tool is used is the policy's to find out."""

    def reset(self, prompt: str) -> None:
        """Begins with the sum that `prompt` asks for."""
        self.calls = 0
        self._sum, self._result = prompt.rstrip("="), ""

    def c(self, sum: str) -> str:
        """
        Computes a sum of digits.

        Args:
            sum: Digits with + and - between them, such as 3+4-5.
        """
        self.calls += 1
        self._result = str(added(sum))
        return self._result

    def teach(self) -> str:
        """Writes what the warm start shows: every other sum is computed, of the others a digit is guessed."""
        if self._result:
            return self._result
        if draw(self._sum) < 0.5:
            return f"c({self._sum})"
        return str(int(10 * draw(self._sum, "guess")))


def added(text: str) -> int:
    """Adds up a text such as 3+4-5; ValueError for any other."""
    if not re.fullmatch(r"\d+([+-]\d+)*", text):
        raise ValueError("?")
    return sum(int(term) for term in re.findall(r"[+-]?\d+", text))
