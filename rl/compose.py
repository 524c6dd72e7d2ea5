"""From the command line to a checked config: recipes, overrides and sweeps, and one clear line for each mistake."""

import difflib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from rl.config import RunConfig, unknown_key, validate
from rl.errors import UserError
from rl.model import resolved

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
RECIPES = ROOT / "recipes"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def register_recipes() -> None:
    """Makes every recipes/NAME.yaml `+recipe=NAME`, from any working folder."""
    for name in recipe_names():
        node = OmegaConf.load(RECIPES / f"{name}.yaml")
        ConfigStore.instance().store(group="recipe", name=name, node=node, package="_global_")


def to_run_config(composed: DictConfig) -> RunConfig:
    try:
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} has no value: set {error.full_key}=...") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {_first_line(error)}") from None
    assert isinstance(values, dict)
    values.pop("recipe", None)
    return resolved(validate({str(key): value for key, value in values.items()}))


def check(overrides: Sequence[str], sweep: bool = False) -> list[RunConfig]:
    """Every config that `overrides` stand for (one, or all of a sweep), or UserError for the first mistake. The runs of a sweep
    have folders of their own."""
    register_recipes()
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise UserError(_first_line(error)) from None
    configs = []
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        base = _base()
        for override in parsed:
            _check_key(override, base)
        for combination in itertools.product(*(_values(o) for o in parsed if not _is_hydra(o))):
            try:
                config = to_run_config(compose("train", overrides=list(combination)))
            except (HydraException, OmegaConfBaseException) as error:
                raise UserError(_first_line(error)) from None
            if sweep:
                out_dir = str(Path(config.out_dir) / sweep_name(overrides, combination))
                config = config.model_copy(update={"out_dir": out_dir})
            configs.append(config)
    return configs


def sweep_name(command_line: Sequence[str], job: Sequence[str]) -> str:
    """What sets one run of a sweep apart: its values of the swept keys, as a folder name ("seed=0,trainer.lr=0.001")."""
    parsed = OverridesParser.create().parse_overrides([a for a in command_line if not a.startswith("-")])
    swept = {o.key_or_group for o in parsed if o.is_sweep_override()}
    own = [o for o in job if o.lstrip("+~").partition("=")[0] in swept]
    return ",".join(own).lstrip("+").replace("/", "_") or "run"


def _base() -> DictConfig:
    return compose("train")


def _is_hydra(override: Override) -> bool:
    return override.key_or_group.partition(".")[0] in ("hydra", "hydra/launcher", "hydra/sweeper")


def _values(override: Override) -> Iterator[str]:
    if override.is_sweep_override():
        return (f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator())
    return iter([_addable(override)])


def _addable(override: Override) -> str:
    """Which keys `data` has depends on the group chosen: added, so that the schema names the keys of that one."""
    line = override.input_line or ""
    return "++" + line if line.startswith("data.") and not override.is_sweep_override() else line


def for_hydra(overrides: Sequence[str]) -> list[str]:
    """What `check` composed, for Hydra to compose."""
    return [_addable(override) for override in OverridesParser.create().parse_overrides(list(overrides))]


def _check_key(override: Override, base: DictConfig) -> None:
    key = override.key_or_group
    if key == "recipe":
        for line in _values(override):
            name = line.partition("=")[2]
            if name not in recipe_names():
                raise UserError(f"unknown recipe {name!r}; known recipes: {', '.join(recipe_names())}")
        return
    groups = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    if key in groups:
        for line in _values(override):
            name = line.partition("=")[2]
            known = sorted(path.stem for path in (CONFIGS / key).glob("*.yaml"))
            if name not in known:
                raise UserError(f"unknown {key} {name!r}; known: {', '.join(known)}")
        return
    if _is_hydra(override) or override.is_add() or override.is_force_add():
        return  # an added key is refused by the schema if it is unknown
    *path, last = key.split(".")
    section: object = base
    for i, part in enumerate([*path, last]):
        if not isinstance(section, DictConfig) or part not in section:
            if path and path[0] == "data":
                return  # see _values
            known = sorted(map(str, section)) if isinstance(section, DictConfig) else []
            close = difflib.get_close_matches(part, known, 1)
            hint = f" (did you mean {'.'.join([*key.split('.')[:i], close[0]])}?)" if close else ""
            raise UserError(unknown_key(".".join(key.split(".")[: i + 1]), known) + hint)
        section = section[part] if not OmegaConf.is_missing(section, part) else None


def _first_line(error: Exception) -> str:
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("    "))
    return text.split(" full_key:")[0].split("Set the environment variable")[0].strip()
