"""The environment of `+recipe=guess`: find a number by asking whether it is lower or higher, in up to eleven turns."""

from rl.environments.games.draw import draw


class Guess:
    """Draws a number from the problem's; earns 1 where it was found in at most `quick` guesses, and less the later it was."""

    def __init__(self, highest: int = 9, quick: int = 4, most: int = 10) -> None:
        self._highest, self._quick, self._most = highest, quick, most

    def reset(self, number: int) -> None:
        """Begins the game of that number."""
        self._secret = 1 + int(self._highest * draw(number))
        self._low, self._high = 1, self._highest
        self.guesses, self.found = 0, False
        self._game = number

    def g(self, guess: int) -> str:
        """
        Compares the secret number with a guess.

        Args:
            guess: What the number may be.
        """
        self.guesses += 1
        self.found = self.found or guess == self._secret
        if guess < self._secret:
            self._low = max(self._low, guess + 1)
            return ">"
        self._high = min(self._high, guess - 1)
        return "=" if guess == self._secret else "<"

    def get_reward(self) -> float:
        """Earns 1 up to `quick` guesses, then less by a straight line, and 0 beyond `most` or where it was not found."""
        left = (self._most + 1 - self.guesses) / (self._most + 1 - self._quick)
        return max(0.0, min(1.0, left)) if self.found else 0.0

    def teach(self) -> str:
        """Writes what the warm start shows: a guess that forgets, nine times in ten, what it was told."""
        if self.found:
            return "!"
        low, high = self._low, self._high
        if draw(self._game, self.guesses, "forgets") < 0.9:
            low, high = 1, self._highest
        return f"g({low + int((high + 1 - low) * draw(self._game, self.guesses))})"
