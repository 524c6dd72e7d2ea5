"""docs/scaling.md: its tables and its chart are what the script writes, and the orders it compares have the bits it says."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling", DOCS / "scaling.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_script_writes(scaling: ModuleType) -> None:
    m = scaling.measured(DOCS / "collectives.json")
    page = (DOCS / "scaling.md").read_text()
    assert scaling.filled(page, scaling.numbers(m)) == page, "run python docs/scaling.py"
    assert scaling.svg(m) == (DOCS / "scaling.svg").read_text(), "run python docs/scaling.py"
    assert all(f"<!-- {name} -->\n" in page for name in scaling.numbers(m))


@pytest.mark.parametrize("ranks", [1, 2, 4, 64, 1024])
def test_the_tree_by_levels_has_the_bits_of_one_rank_and_a_ring_has_not(scaling: ModuleType, ranks: int) -> None:
    assert scaling.check_bits(ranks) == (True, ranks <= 2)
