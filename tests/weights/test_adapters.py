"""Adapters in the format of peft: what is written is what peft loads, what is read is merged by the one op, and what cannot be
used is one line."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.model import Adapter, ConfigError, ModelConfig, served
from kernels.weights.adapters import CONFIG, WEIGHTS, adapter_of, held, load_merged, modules_of, read, write
from kernels.weights.files import load, save
from tests.bits import assert_same_bits
from tests.model.hugging_face import reference_logits
from tests.model.shapes import SHAPES, random_weights

ADAPTERS = {
    "one rank": Adapter((("attention", 4), ("mlp", 4)), 8.0),
    "a rank each, rslora": Adapter((("attention", 2), ("mlp", 5)), 3.0, True),
    "attention": Adapter((("attention", 3),), 1.0),
    "the head": Adapter((("mlp", 2), ("head", 3)), 4.0),
}
OF_EXPERTS = {
    "experts": Adapter((("experts", 4),), 8.0),
    "experts, rslora": Adapter((("experts", 4),), 8.0, True),
    "experts and attention": Adapter((("attention", 2), ("experts", 5), ("head", 2)), 3.0),
}
NAMES = ("tiny", "61 ids", "qwen2", "tied")
WHERE = [(name, how) for how in ADAPTERS for name in NAMES if how != "the head" or not SHAPES[name].tied]
WHERE += [("experts", how) for how in OF_EXPERTS]
ADAPTERS |= OF_EXPERTS


def tensors_of(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Random A and B as a trainer holds them: what is beyond the rank, and stands for no token, is zeros."""
    adapter, noise, out = config.adapter, torch.Generator().manual_seed(1), dict[str, torch.Tensor]()
    assert adapter
    for parameter in served(config):
        if rank := adapter.rank(parameter):
            a, b = adapter.tensors(parameter)
            out[a.name], out[b.name] = (torch.randn(p.shape, generator=noise) / 4 for p in (a, b))
            out[a.name].view(-1, b.columns, a.columns)[:, rank:] = 0
            out[b.name][:, rank:] = 0
            out[b.name][len(out[b.name]) - b.padding :] = 0
    return out


def written(name: str, how: str, root: Path) -> tuple[ModelConfig, Mapping[str, torch.Tensor], Path, Path]:
    config = replace(SHAPES[name], adapter=ADAPTERS[how])
    base, folder = root / "base", root / "adapter"
    save(config, random_weights(config), base, torch.float32)
    tensors = tensors_of(config)
    write(folder, config, tensors, str(base))
    return config, tensors, base, folder


@pytest.mark.parametrize(("name", "how"), WHERE)
def test_what_is_written_is_read(name: str, how: str, tmp_path: Path) -> None:
    config, tensors, _, folder = written(name, how, tmp_path)
    mine, theirs = modules_of(config, tensors), read(folder, config)
    assert mine.keys() == theirs.keys()
    for module, one in mine.items():
        other = theirs[module]
        assert one.scale == other.scale, module
        assert_same_bits(one.a, other.a, module)
        assert_same_bits(one.b, other.b, module)
    assert adapter_of(folder, config) == ADAPTERS[how]
    for tensor_name, tensor in held(config, theirs):
        assert_same_bits(tensor, tensors[tensor_name], tensor_name)


@pytest.mark.parametrize(
    ("name", "how"), [one for one in WHERE if one[1] != "experts, rslora"]
)  # which peft scales otherwise
def test_peft_loads_it_and_its_logits_agree(name: str, how: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'samebit[dev]'")
    from transformers import AutoModelForCausalLM

    config, _, base, folder = written(name, how, tmp_path)
    merged = tmp_path / "merged"
    save(config, load_merged(config, base, read(folder, config), torch.float32), merged, torch.float32)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base).eval(), folder)
    ours = AutoModelForCausalLM.from_pretrained(merged).eval()
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    ids = [[1, 5, 9, 2, 7], [3]]
    want, got, without = (reference_logits(m, ids) for m in (theirs, ours, plain))
    size = want.abs().max()
    assert (want - got).abs().max() < 64 * torch.finfo(torch.float32).eps * size
    assert (want - without).abs().max() > 0.01 * size, "the adapters change nothing"


def test_what_peft_wrote_is_read(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'samebit[dev]'")
    from transformers import AutoModelForCausalLM

    config = SHAPES["tiny"]
    save(config, random_weights(config), tmp_path / "base", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    asked = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "v_proj", "lm_head"],
        rank_pattern={"v_proj": 2},
        task_type="CAUSAL_LM",
    )
    made = peft.get_peft_model(model, asked)
    for parameter in made.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    made.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    ours = dict(load_merged(config, tmp_path / "base", read(tmp_path / "adapter", config), torch.float32))
    want = {n: w for n, w in made.merge_and_unload().named_parameters()}
    names = {hf: p for p in ours for hf in p.hf_names}
    changed = {n for n in want if not torch.equal(want[n], dict(_files(load(config, tmp_path / "base")))[n])}
    assert changed == {n for n in names if n.endswith(("q_proj.weight", "v_proj.weight", "lm_head.weight"))}
    for name, tensor in _files(ours.items()):
        assert (tensor - want[name]).abs().max() < 64 * torch.finfo(torch.float32).eps * want[name].abs().max(), name


def _files(whole):  # type: ignore[no-untyped-def]
    for parameter, tensor in whole:
        yield from zip(parameter.hf_names, parameter.to_files(tensor).split(parameter.stored), strict=True)


BAD = {
    "peft_type": ("IA3", "adapters here are LORA"),
    "use_dora": (True, "use_dora=True is not supported; it must be False"),
    "bias": ("all", "bias='all' is not supported; it must be 'none'"),
    "modules_to_save": (["lm_head"], "modules_to_save=['lm_head'] is not supported; it must be None"),
    "r": (7, "says rank 7 for model.layers.0"),
    "lora_alpha": ("x", "lora_alpha='x' must be a number"),
}


@pytest.mark.parametrize("field", BAD)
def test_a_config_that_says_what_is_not_done_here_is_refused(field: str, tmp_path: Path) -> None:
    config, _, _, folder = written("tiny", "one rank", tmp_path)
    value, said = BAD[field]
    fields = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(fields | {field: value}))
    with pytest.raises(ConfigError) as error:
        read(folder, config)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    config, _, _, folder = written("tiny", "one rank", tmp_path)
    held = load_file(folder / WEIGHTS)
    key = next(k for k in held if k.endswith("layers.1.mlp.down_proj.lora_A.weight"))
    cases = {
        "do not fit a matrix of (32, 64)": held | {key: held[key][:, 1:].contiguous()},
        "has only one of lora_A and lora_B": {k: t for k, t in held.items() if k != key},
        "the model has no matrix for": held | {key.replace("layers.1", "layers.9"): held[key].clone()},
        "holds no lora_A.weight": {"x": held[key]},
        "neither a lora_A.weight nor": held | {"x": held[key].clone()},
    }
    for said, tensors in cases.items():
        save_file(tensors, folder / WEIGHTS)
        with pytest.raises(ConfigError) as error:
            read(folder, config)
        assert said in str(error.value)
    (folder / WEIGHTS).write_bytes(b"no")
    with pytest.raises(ConfigError, match="not a readable safetensors file"):
        read(folder, config)
    (folder / CONFIG).unlink()
    with pytest.raises(ConfigError, match=r"adapter_config\.json does not exist"):
        read(folder, config)
