"""The same weights in transformers."""

from collections.abc import Mapping

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kernels.model import ModelConfig, saved
from kernels.weights.files import to_hf

EPS = torch.finfo(torch.float32).eps


def reference(config: ModelConfig, weights: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32):
    """The model that transformers builds from its own config class, with these weights."""
    fields = config.to_hf()
    for unused in ("architectures", "torch_dtype", "rope_theta"):
        fields.pop(unused)
    made = AutoConfig.for_model(fields.pop("model_type"), **fields)
    hf = AutoModelForCausalLM.from_config(made, attn_implementation="eager", experts_implementation="eager")
    assert type(hf).__name__ == config.family.architecture
    state = {n: t for p in saved(config) for n, t in to_hf(p, weights[p.name]).items()}
    missing, unexpected = hf.load_state_dict(_stacked(config, state), strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if config.tied else [])
    hf.tie_weights()
    return hf.to(dtype).eval()


def _stacked(config: ModelConfig, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As transformers holds experts, which its files do not: all of a layer in one tensor, gate rows over up rows."""
    out = {n: t for n, t in state.items() if ".experts." not in n}
    for layer in filter(config.sparse, range(config.layers)):
        at = f"model.layers.{layer}.mlp.experts"
        of = {
            x: [state[f"{at}.{e}.{x}_proj.weight"] for e in range(config.experts.count)] for x in ("gate", "up", "down")
        }
        out[f"{at}.gate_up_proj"] = torch.cat([torch.stack(of["gate"]), torch.stack(of["up"])], 1)
        out[f"{at}.down_proj"] = torch.stack(of["down"])
    return out


def in_files(config: ModelConfig, named: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of transformers' model by the names that files have."""
    out = dict(named)
    for layer in filter(config.sparse, range(config.layers)):
        at = f"model.layers.{layer}.mlp.experts"
        gate_up, down = out.pop(f"{at}.gate_up_proj"), out.pop(f"{at}.down_proj")
        for e, (both, last) in enumerate(zip(gate_up, down, strict=True)):
            gate, up = both.chunk(2)
            out |= {f"{at}.{e}.{x}_proj.weight": t for x, t in (("gate", gate), ("up", up), ("down", last))}
    return out


@torch.no_grad()
def reference_logits(hf: torch.nn.Module, sequences: list[list[int]]) -> torch.Tensor:
    """[tokens of all sequences, V], each sequence on its own."""
    return torch.cat([hf(torch.tensor([s])).logits[0] for s in sequences])


def units(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in float32 eps times the largest magnitude of `expected`."""
    difference = (actual.double() - expected.double()).abs().max()
    return float(difference / (EPS * expected.double().abs().max()))
