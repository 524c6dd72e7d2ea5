"""Rewards what a server of a reward model answers."""

import asyncio
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from http.client import HTTPException
from typing import Any

from rl.lines import short

_PASSES = (408, 429, 500, 502, 503, 504)  # statuses of a server that may do better in a moment


class Server:
    """POSTs {"prompts": [...], "completions": [...]} of one problem and takes {"rewards": [...]}, one number or null a
    completion.

    Whether the server answers alike on every day is its own affair; a run is the same again only if it does.
    """

    def __init__(self, url: str, timeout: float = 60.0, retries: int = 3, key: str = "", columns: bool = False) -> None:
        """
        timeout  seconds of one request
        retries  further ones where the server cannot be reached, is busy or fails by itself, after 1, 2, 4, ... seconds; then,
                 and at once where it refuses the request, it is an error (scoring.errors)
        key      the environment variable that holds a bearer token
        columns  sends the columns of the row too
        """
        self._url, self._how, self._columns = url, (timeout, retries, key), columns

    async def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        trainer_state: None,
        environments: object,
        log_metric: Callable[..., None],
        log_extra: Callable[..., None],
        **row: Any,
    ) -> list[float | None]:
        """Returns the rewards of the completions of one problem, as TRL calls for them."""
        body = (row if self._columns else {}) | {"prompts": prompts, "completions": completions}
        answer = await asyncio.to_thread(post, self._url, body, *self._how)
        if not isinstance(answer, Mapping) or not isinstance(answer.get("rewards"), list):
            raise ValueError(f"{self._url} answered no rewards: {short(answer)}")
        return list(answer["rewards"])


def post(url: str, body: Mapping[str, Any], timeout: float, retries: int, key: str) -> Any:
    """POSTs JSON and returns the JSON of the answer; see `Server` for the arguments. ConnectionError says what went wrong."""
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {os.environ[key]}"
    request = urllib.request.Request(url, json.dumps(body, default=str).encode(), headers)
    for attempt in range(retries + 1):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            how, again = f"status {error.code}: {short(error.read().decode('utf-8', 'replace'))}", error.code in _PASSES
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
            how, again = str(getattr(error, "reason", "") or error) or type(error).__name__, True
        if not again:
            raise ConnectionError(f"{url} refused the request ({how})")
        if attempt < retries:
            time.sleep(1 << attempt)
    raise ConnectionError(f"{url} gave no answer in {retries + 1} attempts ({how})")
