"""The documentation as a site: it builds without a network, every link leads somewhere, and what it says of keys, messages and
commands is what the code has."""

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml

from rl.compose import check_keys
from rl.config import RunConfig, _all_keys

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


@pytest.fixture(scope="module")
def generated() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generated", DOCS / "generated.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_builds_and_every_link_leads_somewhere(tmp_path: Path) -> None:
    """--strict: a link to a page, an anchor or a file that there is not, and a page that no menu has, are errors."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {path.parent.name for path in (tmp_path / "site").rglob("index.html")}
    assert {p.stem for p in PAGES} - {"index"} | {"configuration", "messages"} <= found
    html = (tmp_path / "site" / "configuration" / "index.html").read_text()
    assert "align.keep_batches" in html and not re.search(r'(src|href)="https?://fonts', html)


def test_a_page_that_the_menu_does_not_name_is_in_it(generated: ModuleType) -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    lost = nav[3]["Guides"].pop(0)
    config = generated.on_config(SimpleNamespace(nav=nav))
    assert lost == {"Data": "data.md"} and {"Data": "data.md"} in config.nav[3]["Guides"]
    named = re.findall(r"(\w+\.md)", str(config.nav))
    assert sorted(named) == sorted([*(p.name for p in PAGES), "configuration.md", "messages.md"])


def test_every_key_has_a_row_with_values_default_and_meaning(generated: ModuleType) -> None:
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.+) \|$", generated.configuration(), re.MULTILINE))
    missing = {key for key in _all_keys(RunConfig)} - rows.keys()
    assert not missing
    for key, row in rows.items():
        values, default, meaning = re.split(r" \| ", row, maxsplit=2)
        assert values and default and meaning.strip(), key
        assert "see its page" not in values, key
    assert (
        "`450`" in rows["warmup.steps"]
        and "at most 1" in rows["rollout.top_p"]
        and "none: it must be given" in rows["data.path"]
    )


def literals() -> Iterator[str]:
    """Every text of the packages, with … for what it fills in."""
    for package in ("rl", "rollout", "trainer", "kernels"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_what_troubleshooting_quotes_is_what_the_code_says() -> None:
    page = (DOCS / "troubleshooting.md").read_text().partition("## It runs, and")[0]
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    quoted = [text for cell in cells for text in re.findall(r"`([^`]+)`", cell)]
    said = "\n".join(literals())
    assert len(quoted) > 25
    pieces = {message: [p.strip(" ()?*=:,.'") for p in re.split(r"…|\b[NXY]\b", message)] for message in quoted}
    unsaid = {m: wrong for m, of in pieces.items() if (wrong := [p for p in of if p not in said]) or not any(of)}
    assert not unsaid


def test_the_messages_are_many_and_name_their_file(generated: ModuleType) -> None:
    page = generated.messages()
    assert page.count("\n| ") > 200
    assert "| eval.sets.…: … | `rl/evaluation/sets.py` |" in page or "unknown key" in page
    assert all((ROOT / where).is_file() for where in set(re.findall(r"\| `([\w/]+\.py)` \|$", page, re.MULTILINE)))


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every `python -m` line of the pages, with its words."""
    for page in PAGES:
        for line in re.sub(r"\\\n\s*", "", page.read_text()).splitlines():
            if found := re.match(r"(?:\$ )?(python -m [\w.]+.*?)(?:\s+#.*)?$", line):
                yield page.name, found[1].split()


def test_every_command_is_one_that_there_is() -> None:
    seen = 0
    for page, words in commands():
        module = words[2]
        assert importlib.util.find_spec(module), (page, module)
        if module in ("rl.train", "rl.data") and not any("'" in w or '"' in w or "{" in w for w in words):
            keys = [w for w in words[3:] if "=" in w and not w.startswith("-") and "KEY" not in w and "NAME" not in w]
            check_keys([k for k in keys if not k.startswith("algorithm=...")])
            seen += 1
    assert seen > 8
