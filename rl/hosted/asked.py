"""Says what a run asks of models that transformers computes, as far as its config and their folders tell."""

from dataclasses import dataclass
from typing import Any

from kernels.packages import version_of
from rl.config import RunConfig
from rl.errors import UserError
from rl.frozen import check_tokenizer, check_vocabulary, folder_of
from rl.hosted.loading import AUTOMATIC
from rl.lines import short
from rl.rewards.placed import is_placed
from rl.rewards.section import MODEL, OF_OTHERS
from rollout.tokenizer import Tokenizer


@dataclass(frozen=True)
class HostedModel:
    """Names a reference or a teacher that transformers computes."""

    key: str  # that asks for it
    path: str
    device_map: Any


def hosted_model(config: RunConfig) -> HostedModel | None:
    """Returns the reference or teacher that the exact kernels do not compute; None where there is none. UserError where it is
    no folder."""
    asked = config.algorithm.frozen
    if asked is None or asked.device_map is None:
        return None
    path = folder_of(config, asked)
    return HostedModel(asked.key, path, asked.device_map) if path else None


def check_hosted(hosted: HostedModel, mine: Tokenizer, vocabulary: int, length: int) -> None:
    """Raises UserError where the model has another tokenizer than `mine`, the run's, a smaller vocabulary than the policy's, or
    no room for a sequence of `length` tokens."""
    import transformers

    where = f"{hosted.key}={hosted.path}"
    transformers.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(hosted.path, local_files_only=True).get_text_config()
    except Exception as error:  # of whatever the folder lacks
        raise UserError(f"{where} is no model that transformers knows: {short(error)}") from None
    check_tokenizer(hosted.key, hosted.path, mine, exact=False)
    check_vocabulary(where, config.vocab_size, vocabulary)
    room = getattr(config, "max_position_embeddings", None)
    if room and length > room:
        raise UserError(f"{where}: sequences of up to {length} tokens exceed its {room} positions")


def is_automatic(config: RunConfig, device_map: Any) -> bool:
    """Tells whether accelerate spreads a model over the cards that no rank has; on a CPU it takes what there is."""
    return config.device == "cuda" and device_map in AUTOMATIC


def needs_cards(config: RunConfig) -> str:
    """Names the key of a model that accelerate is to spread over cards that no rank has; "" where there is none."""
    hosted = hosted_model(config)
    rewards = [*config.reward, *(r for one in config.eval.sets.values() for r in one.reward or ())]
    maps = [("algorithm.device_map", hosted and hosted.device_map)]
    maps += [("the device_map of reward=model", r.args["device_map"]) for r in rewards if is_placed(r)]
    return next((f"{key}={value}" for key, value in maps if is_automatic(config, value)), "")


def elsewhere(config: RunConfig) -> list[str]:
    """Lists what decides what is trained on and is computed by another program, whose bits are not ours to promise."""
    hosted = hosted_model(config)
    rewards = [f"reward={reward.function}" for reward in config.reward if reward.function in OF_OTHERS]
    return [*([f"{hosted.key}={hosted.path}"] if hosted else []), *dict.fromkeys(rewards)]


def by_transformers(config: RunConfig) -> dict[str, str]:
    """Returns the versions that the bits of `elsewhere` depend on; empty where transformers computes none of it."""
    if hosted_model(config) is None and not any(reward.function == MODEL for reward in config.reward):
        return {}
    return {name: version_of(name) or "none" for name in ("transformers", "torch")}
