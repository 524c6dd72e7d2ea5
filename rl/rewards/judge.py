"""Rewards what a language model says of a completion, asked at an endpoint of OpenAI's form."""

import asyncio
import re

from rl.data.problem import Problem
from rl.lines import short
from rl.rewards.http import post

_TEMPLATE = (
    "Question:\n{prompt}\n\nReference answer:\n{answer}\n\nResponse:\n{text}\n\n"
    "Does the response state the reference answer? Give your reasons in two sentences. Then end with one line: "
    "SCORE: 1 if it does, SCORE: 0 if it does not."
)


async def judge(
    problem: Problem,
    text: str,
    url: str,
    model: str,
    template: str = _TEMPLATE,
    pattern: str = r"SCORE:\s*(-?\d+(?:\.\d+)?)",
    scale: float = 1.0,
    max_tokens: int = 512,
    timeout: float = 60.0,
    retries: int = 3,
    key: str = "",
) -> dict[str, float | str]:
    """Asks `model` at `url`/chat/completions, greedily; the reward is the number of the last match of `pattern`, divided by
    `scale`. No match is an error (scoring.errors).

    template   of the question: {prompt}, {answer} and {text} stand for those of the sample
    timeout, retries, key  as those of the reward `http`

    A completion can talk to the judge as the template does. Few servers promise the same answer every time: a run is the same
    again only if this one gives it.
    """
    values = {"prompt": problem.prompt, "answer": problem.answer, "text": text}
    question = re.sub(r"\{(prompt|answer|text)\}", lambda found: values[found[1]], template)
    messages = [{"role": "user", "content": question}]
    body = {"model": model, "messages": messages, "temperature": 0, "seed": 0, "max_tokens": max_tokens}
    answer = await asyncio.to_thread(post, f"{url.rstrip('/')}/chat/completions", body, timeout, retries, key)
    said = answer["choices"][0]["message"]["content"] or ""
    scores = re.findall(pattern, said)
    if not scores:
        raise ValueError(f"{model} gave no score: {short(said)}")
    return {"score": float(scores[-1]) / scale, "said": said}
