"""Makes checked configs of what a user typed: recipes, overrides and sweeps, and one clear line for each mistake."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from rl.command_line import quoted, readable
from rl.config import RunConfig, unknown_key, validate
from rl.errors import UserError
from rl.model import resolved

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
RECIPES = ROOT / "recipes"


def recipe_names() -> list[str]:
    """Lists the recipes by name, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def register_recipes() -> None:
    """Makes every recipes/NAME.yaml `+recipe=NAME`, from any working folder."""
    for name in recipe_names():
        node = OmegaConf.load(RECIPES / f"{name}.yaml")
        ConfigStore.instance().store(group="recipe", name=name, node=node, package="_global_")


def to_run_config(composed: DictConfig) -> RunConfig:
    """Returns what Hydra composed as a typed config, or raises UserError with the first key that is wrong."""
    try:
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} has no value: set {error.full_key}=...") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {_first_line(error)}") from None
    assert isinstance(values, dict)
    values.pop("recipe", None)
    return resolved(validate(filled({str(key): value for key, value in values.items()})))


def filled(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the nested `values` of a config with every source of a mixture and every set of an evaluation whole."""
    out = dict(values)
    for section, name in (("data", "sources"), ("eval", "sets")):
        if isinstance(held := out.get(section), dict) and isinstance(parts := held.get(name), dict):
            whole = {part: _source(f"{section}.{name}.{part}", said) for part, said in parts.items()}
            out[section] = {**held, name: whole}
    return out


def _source(key: str, said: Any) -> Any:
    """Returns what is `said` of a source of problems, over the values of the group `data` that it begins with."""
    if not isinstance(said, dict):
        return said
    group = said.get("data", "reasoning_gym" if "task" in said else "dataset")
    known = sorted(path.stem for path in (CONFIGS / "data").glob("*.yaml") if path.stem != "mixture")
    if group not in known:
        raise UserError(f"{key}.data: unknown data {group!r}; known: {', '.join(known)}")
    values = {**yaml.safe_load((CONFIGS / f"data/{group}.yaml").read_text()), **said}
    values.pop("data", None)
    if missing := [name for name, value in values.items() if value == "???"]:
        raise UserError(f"{key}.{missing[0]} has no value: set {key}.{missing[0]}=...")
    return values


def check(overrides: Sequence[str], sweep: bool = False) -> list[RunConfig]:
    """Returns every config that `overrides` stand for (one, or all of a sweep), or raises UserError for the first mistake.
    The runs of a sweep have folders of their own."""
    overrides = readable(overrides)
    configs = []
    with _composing() as loader:
        parsed = OverridesParser.create(loader).parse_overrides(list(overrides))
        _check_keys(parsed)
        if own := [o.input_line or "" for o in parsed if _is_hydra(o)]:  # Hydra composes its own config when it runs
            compose("train", overrides=own, return_hydra_config=True)
        for combination in itertools.product(*(_values(o) for o in parsed if not _is_hydra(o))):
            config = to_run_config(compose("train", overrides=list(combination)))
            if config.model.path and (shape := [o for o in combination if o.lstrip("+~").startswith("model.hf.")]):
                raise UserError(f"{shape[0].lstrip('+')}: the shape is that of model.path={config.model.path}")
            if sweep:
                out_dir = str(Path(config.out_dir) / sweep_name(overrides, combination))
                config = config.model_copy(update={"out_dir": out_dir})
            configs.append(config)
    return configs


def check_keys(overrides: Sequence[str]) -> None:
    """Raises UserError for the first override that names no key or choice: of a config that is shown, values may be missing."""
    with _composing() as loader:
        _check_keys(OverridesParser.create(loader).parse_overrides(readable(overrides)))


@contextlib.contextmanager
def _composing() -> Iterator[ConfigLoader]:
    """Opens Hydra over configs/, whose errors are one line."""
    register_recipes()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        try:
            yield GlobalHydra.instance().config_loader()
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(_first_line(error)) from None


def sweep_name(command_line: Sequence[str], job: Sequence[str]) -> str:
    """Names one run of a sweep by what sets it apart: its values of the swept keys, as a folder name
    ("seed=0,trainer.lr=0.001")."""
    parsed = OverridesParser.create().parse_overrides([a for a in command_line if not a.startswith("-")])
    swept = {o.key_or_group for o in parsed if o.is_sweep_override()}
    own = [o for o in job if o.lstrip("+~").partition("=")[0] in swept]
    return ",".join(own).lstrip("+").replace("/", "_") or "run"


def _is_hydra(override: Override) -> bool:
    return override.key_or_group.startswith(("hydra.", "hydra/"))


def _values(override: Override) -> list[str]:
    """Lists the overrides that one stands for."""
    if not override.is_sweep_override():
        return [_addable(override)]
    line, key = override.input_line, override.key_or_group
    if not override.is_discrete_sweep():
        raise UserError(f"{line}: an interval has no values of its own: give them, or a range")
    values = [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
    if not values:
        why = "" if key in _groups() else f": {key} is no group; glob chooses among {', '.join(sorted(_groups()))}"
        raise UserError(f"{line} stands for no value{why}")
    return values


_OPEN = ("data.", "eval.sets")
"""Keys below which there may be others: by the group that is chosen, or by names of the user's."""


def _addable(override: Override) -> str:
    """Adds what is open, so that the schema names the keys that there are."""
    line = override.input_line or ""
    return "++" + line if line.startswith(_OPEN) and not override.is_sweep_override() else line


def for_hydra(overrides: Sequence[str], out_dir: str) -> list[str]:
    """Writes what `check` composed, for Hydra to compose in the `out_dir` that it found: the default names a time."""
    parsed = OverridesParser.create().parse_overrides(readable(overrides))
    if any(o.is_sweep_override() for o in parsed if o.key_or_group == "out_dir"):
        return [_addable(o) for o in parsed]
    return [*(_addable(o) for o in parsed if o.key_or_group != "out_dir"), quoted("out_dir", out_dir)]


def _groups() -> list[str]:
    return [path.name for path in CONFIGS.iterdir() if path.is_dir()] + ["recipe"]


def _check_keys(parsed: Sequence[Override]) -> None:
    """Raises UserError for the first override whose choice, or whose key, there is not. Which keys there are depends on what is
    chosen; of a sweep over choices, on its last."""
    groups = [o for o in parsed if o.key_or_group in _groups()]
    for override in groups:
        _check_choice(override)
    base = compose("train", overrides=[_values(o)[-1] for o in groups])
    for override in parsed:
        if override not in groups:
            _check_key(override, base)
        if override.key_or_group == "algorithm.name":
            _check_name(override, base.algorithm.name)


def _check_name(override: Override, composed: str) -> None:
    """Refuses an algorithm by its name alone: the values would be those of another."""
    for line in _values(override):
        if (name := line.partition("=")[2]) != composed:
            raise UserError(f"algorithm.name={name}: choose algorithm={name}, which brings values of its own")


def _check_choice(override: Override) -> None:
    key = override.key_or_group
    known = recipe_names() if key == "recipe" else sorted(path.stem for path in (CONFIGS / key).glob("*.yaml"))
    for line in _values(override):
        if (name := line.partition("=")[2]) not in known:
            raise UserError(f"unknown {key} {name!r}; known: {', '.join(known)}")


def _check_key(override: Override, base: DictConfig) -> None:
    key = override.key_or_group
    if _is_hydra(override) or override.is_add() or override.is_force_add():
        return  # an added key is refused by the schema if it is unknown
    *path, last = key.split(".")
    section: object = base
    for i, part in enumerate([*path, last]):
        if not isinstance(section, DictConfig) or part not in section:
            if key.startswith(_OPEN):
                return  # see _addable
            known = sorted(map(str, section)) if isinstance(section, DictConfig) else []
            raise UserError(unknown_key(".".join(key.split(".")[: i + 1]), known, key))
        section = section[part] if not OmegaConf.is_missing(section, part) else None


def _first_line(error: Exception) -> str:
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("    "))
    for end in (" full_key:", "Set the environment variable", "Config search path:", "See https://"):
        text = text.split(end)[0]
    return text.strip()
