"""The command line as a user types it."""

import os
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.command_line import PATHS, quoted, readable
from rl.compose import check, for_hydra
from rl.config import RunConfig, _all_keys
from rl.keys import _CALLED, nearest
from tests.rl.command import call
from tests.weights.folders import write_folder

words = st.text(alphabet="ab19 #=~/:@!?;&|<>*.%+-é$\\'\"()[]{},", max_size=12)


some_text = words.filter(lambda text: text and "${" not in text)
some_path = st.text(alphabet="abz/#=~:@!?;&|<>*.%+é", min_size=1, max_size=12).map("/".__add__)
SEVERAL = settings(max_examples=300, deadline=None, derandomize=True)
FEW = settings(max_examples=20, deadline=None, derandomize=True)  # a config each, which takes 0.2 s


def read(override: str) -> object:
    """The value of an override, as Hydra reads what is handed to it."""
    (parsed,) = OverridesParser.create().parse_overrides(readable([override]))
    return parsed.value()


@SEVERAL
@given(some_text)
def test_any_text_can_be_quoted(text: str) -> None:
    assert read(quoted("data.pattern", text)) == text


@FEW
@given(some_text)
def test_any_text_comes_into_a_config(text: str) -> None:
    assert check([quoted("data.pattern", text)])[0].data.pattern == text


@SEVERAL
@given(some_path)
def test_a_text_without_signs_of_the_grammar_needs_no_quotes(text: str) -> None:
    assert read(f"out_dir={text}") == text


@FEW
@given(some_path)
def test_a_path_comes_into_a_config_without_quotes(text: str) -> None:
    assert check([f"out_dir={text}"])[0].out_dir == text


@pytest.mark.parametrize("key", PATHS)
def test_home(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the shell would have it, were there no key before it."""
    home = tmp_path / "some one"
    monkeypatch.setenv("HOME", str(home))
    write_folder(home / "runs" / "seed=0")  # a model has to be there
    data = ["data=gsm8k", "data.path=x", *(["algorithm=distillation"] if key == "algorithm.teacher" else [])]
    for line in (f"{key}=~/runs/seed=0", quoted(key, "~/runs/seed=0")):
        (config,) = check([*data, line])
        section, _, name = key.rpartition(".")
        assert getattr(getattr(config, section) if section else config, name) == f"{home}/runs/seed=0"
    (config,) = check([*data, "out_dir=~"])
    assert config.out_dir == str(home)
    assert check([*data, "data.path=a~b", "reward=~"])[0].data.path == "a~b"


def test_what_hydra_composes_is_what_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for lines in (["out_dir='~/x'", "steps=3"], ["+recipe=gsm8k_tiny", "data.path=~/d#1", "data.marker=####"], []):
        (config,) = check(lines)
        assert check(for_hydra(lines, config.out_dir)) == [config]
    swept = ["seed=0,1", "out_dir=~/x"]
    configs = check(swept, sweep=True)
    assert [c.out_dir for c in configs] == ["/home/me/x/seed=0", "/home/me/x/seed=1"]
    assert check(for_hydra(swept, str(Path(configs[0].out_dir).parent)), sweep=True) == configs
    assert [c.seed for c in check(["seed=0,1", "out_dir=a,b"], sweep=True)] == [0, 0, 1, 1]


def test_glob_chooses_among_groups() -> None:
    configs = check(["model=glob(qwen3*,exclude=*a3b)", "model.path=null"], sweep=True)
    assert [Path(c.out_dir).name for c in configs] == ["model=qwen3_0p6b", "model=qwen3_8b"]
    assert len(readable(["model=glob(qwen3*,exclude=*a3b)"])) == 1


def test_configs_are_shown() -> None:
    for line in (("--cfg", "job", "-p", "trainer", "trainer.lr=0.5"), ("-c", "job", "out_dir=~/x=1"), ("--help",)):
        shown = call(*line)
        assert shown.code == 0 and "lr: 0.5" in shown.out + "lr: 0.5" * ("-p" not in line)


KEYS = list(_all_keys(RunConfig))


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("stpes", "steps"),
        ("rollout.tpp", "rollout.tp"),
        ("rollout.temprature", "rollout.temperature"),
        ("trainer.learning_rate", "trainer.lr"),
        ("warmup.learning_rate", "warmup.lr"),
        ("tensor_parallel", "rollout.tp"),
        ("world_size", "trainer.world_size"),
        ("outdir", "out_dir"),
        ("rollout.num_generations", "algorithm.group_size"),
        ("trainer.max_grad_norm", "trainer.grad_clip"),
        ("DATA.PATH", "data.path"),
    ],
)
def test_the_key_that_was_meant(asked: str, meant: str) -> None:
    assert nearest(asked, KEYS)[:1] == [meant]


def test_nothing_is_near() -> None:
    assert [asked for asked in ("unknown", "trainer.foo", "", ".", "a_b_c_d") if nearest(asked, KEYS)] == []
    assert set(_CALLED) <= set(KEYS)
    assert os.path.expanduser("~") != "~"
