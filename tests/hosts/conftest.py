"""Hosts for the tests of this folder; where the machine has none to give, they are skipped, with the reason."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hosts.namespaces import Hosts, hosts, unable

Make = Callable[..., Hosts]


@pytest.fixture(scope="module")
def make_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    """Returns what makes `count` hosts that share a folder (`hosts.shared`, there SHARED), until the module's end."""
    if why := unable():
        pytest.skip(why)
    with contextlib.ExitStack() as stack:

        def make(count: int, cable: bool = False) -> Hosts:
            shared: Path = tmp_path_factory.mktemp("shared")
            try:
                return stack.enter_context(hosts(count, shared, cable))
            except (AssertionError, OSError) as error:  # of the machine: nothing of ours has started yet
                pytest.skip(f"no hosts here: {' '.join(str(error).split())[:200]}")

        yield make
