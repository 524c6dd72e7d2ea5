"""Every number of the schema: what its dtype does not hold is refused where it is read, and no size ends in a traceback."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest

from kernels.model import ConfigError
from rl.compose import check
from rl.config import RunConfig, Section, _all_keys, validate
from rl.data.section import ReasoningGymSection
from rl.errors import BAD_INPUT, UserError
from rl.model import model_config, resolved
from rl.plan import make_plan

FILES = ("data=gsm8k", "data.path=unused")


def numbers(section: Any = RunConfig, path: str = "") -> Iterator[tuple[str, type]]:
    """Every key that holds a number, and which kind of number: a walk of the schema, so that a new key is covered."""
    for name, field in section.model_fields.items():
        named = get_origin(field.annotation) is dict  # sections by names of the user's, which are those of `data`
        kinds = kinds_of(field.annotation)
        for below in [k for k in kinds if not named and isinstance(k, type) and issubclass(k, Section)]:
            yield from numbers(below, f"{path}{name}.0." if get_origin(field.annotation) is tuple else f"{path}{name}.")
        if not named and (float in kinds or (int in kinds and bool not in kinds)):
            yield f"{path}{name}", float if float in kinds else int


def kinds_of(annotation: Any) -> list[Any]:
    below = [kinds_of(part) for part in get_args(annotation) if not isinstance(part, str | int)]
    return [annotation, *(kind for kinds in below for kind in kinds)]


KEYS = dict(numbers())
PAIR = "trainer.betas"


GYM = {f"data.{name}" for name in ReasoningGymSection.model_fields}
TWO = "reward=[verifier,format]"
BASES = {
    kind: check([*given, TWO])[0].model_dump()
    for kind, given in (("gym", ()), ("files", FILES), ("ppo", ("algorithm=ppo",)))
}


def with_value(key: str, value: Any) -> RunConfig:
    """A config as the command line's is made, without Hydra, which takes a second for each."""
    parts = key.split(".")
    of_ppo = parts[0] == "algorithm" and parts[1] not in BASES["gym"]["algorithm"]
    values = copy.deepcopy(BASES["files" if parts[0] == "data" and key not in GYM else "ppo" if of_ppo else "gym"])
    section = values
    for part in parts[:-1]:
        section = section[int(part) if part.isdigit() else part]
    section[parts[-1]] = [0.5, value] if key == PAIR else value
    return resolved(validate(values))


def test_the_walk_finds_them() -> None:
    floats = {key for key, kind in KEYS.items() if kind is float}
    assert {
        "trainer.lr",
        "trainer.eps",
        PAIR,
        "reward.0.weight",
        "rollout.temperature",
        "warmup.lr",
        "warmup.wrong_frac",
    } <= floats
    assert {"cluster.timeout", "rollout.pages", "data.problems", "data.vocab_size", "steps"} <= KEYS.keys() - floats
    assert len(KEYS) > 40 and "save_model" not in KEYS and "data.path" not in KEYS


@pytest.mark.parametrize("value", [1e-300, 1e-39, 1e39, 1e308, -1e-300])
@pytest.mark.parametrize("key", [key for key, kind in KEYS.items() if kind is float])
def test_no_number_that_float32_does_not_hold(key: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^{key}(\.1)?=.*must|^{key}(\.1)?=.*should be"):
        with_value(key, value)


@pytest.mark.parametrize("value", [1e19, 2**63, -1e19, 1e30])
@pytest.mark.parametrize("key", [key for key, kind in KEYS.items() if kind is int])
def test_no_number_that_int64_does_not_hold(key: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^{key}=-?\d"):
        with_value(key, value)


@pytest.mark.parametrize("value", [2**31, 2**53, 2**63 - 1])
@pytest.mark.parametrize("key", [key for key, kind in KEYS.items() if kind is int])
def test_no_size_ends_in_a_traceback(key: str, value: int) -> None:
    """It is planned, or refused in one line."""
    try:
        config = with_value(key, value)
        make_plan(config, model_config(config, 64), 20)
    except BAD_INPUT as error:
        assert "\n" not in str(error)


def test_a_decay_that_rounds_to_one() -> None:
    with pytest.raises(UserError, match=r"^trainer.betas.1=0.9999999999: is 1 in float32"):
        check(["trainer.betas=[0.9,0.9999999999]"])


def test_a_model_folder_has_its_own_shape(tmp_path: Path) -> None:
    """Overrides that nothing would read."""
    model = model_config(check([])[0], 64)
    (tmp_path / "config.json").write_text(json.dumps(model.to_hf()))
    with pytest.raises(UserError, match=r"^model.hf.num_experts=8: the shape is that of model.path="):
        check([f"model.path={tmp_path}", "+model.hf.num_experts=8"])


@pytest.mark.parametrize(
    "field",
    ["attn_logit_softcapping=50", "num_experts=8", "num_local_experts=4", "qk_layernorm=true", "scale_attn=0.5"],
)
def test_no_field_of_a_model_that_may_decide_numbers(field: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^model.hf.{field.split('=')[0]}=.* is not understood, and may decide numbers"
    ):
        model_config(check([f"+model.hf.{field}"])[0], 64)


def test_layers_of_another_kind() -> None:
    with pytest.raises(ConfigError, match=r"layer_types=.*must be 'full_attention'"):
        model_config(check(["+model.hf.layer_types=[sliding_attention]"])[0], 64)


def test_the_keys_of_all_choices_stay_few() -> None:
    """A reader must be able to know them; a section that one of several may stand for counts once by name."""
    assert len(set(_all_keys(RunConfig))) < 140
