"""Published FP8 checkpoints, in the layout of Qwen3-8B-FP8: loaded as they are, trained from; other ones are refused."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.model import ConfigError, saved
from kernels.model.formats import PLAIN
from kernels.ops import Quantized, dequantize_blocks, quantize_blocks
from kernels.tree import WHOLE
from kernels.weights.adapters import merged
from kernels.weights.digest import digest, slice_digests
from kernels.weights.files import find, load, load_as_stored, read_rows, save
from kernels.weights.folder import ModelFolder
from rollout.engine import Engine, EngineConfig
from rollout.scheduler import Limits
from rollout.source import Source
from rollout.verify import main
from tests.bits import assert_same_bits, integers
from tests.model.shapes import FP8, random_weights

PUBLISHED = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm", "model.layers.0.mlp.gate", "model.norm"],
}
CONFIG = replace(FP8, layers=1)


def publish(path: Path, scales: torch.dtype = torch.float32, **said: Any) -> Path:
    """Writes a folder whose scales are amax / 448, rounded to `scales` as the tools that make such files do."""
    save(replace(CONFIG, format=PLAIN), random_weights(CONFIG), path, torch.bfloat16)
    tensors = load_file(path / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        w = tensors[name].float()
        blocks = w.view(w.shape[0] // 128, 128, -1, 128)
        scale = (blocks.abs().amax((1, 3)) / 448).to(scales)
        values = (blocks / scale.float()[:, None, :, None]).clamp(-448, 448).view(w.shape)
        tensors[name], tensors[name + "_scale_inv"] = values.to(torch.float8_e4m3fn), scale
    save_file(tensors, path / "model.safetensors")
    fields = json.loads((path / "config.json").read_text())
    del fields["samebit"]
    (path / "config.json").write_text(json.dumps(fields | {"quantization_config": PUBLISHED | said}))
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    return {dtype: publish(tmp_path_factory.mktemp("model"), dtype) for dtype in (torch.float32, torch.bfloat16)}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def folder(request: pytest.FixtureRequest, folders: dict[torch.dtype, Path]) -> Path:
    return folders[request.param]


def test_it_says_how_it_is_computed(folder: Path) -> None:
    read = ModelFolder(folder)
    contract = read.asked(2, None)
    assert (contract.format, contract.dtype) == ("fp8_block", "bfloat16") == (read.format, "bfloat16")
    assert read.model(2) == CONFIG and read.asked(2, None, otherwise="float32").dtype == "bfloat16"
    with pytest.raises(ConfigError, match="holds its projections as fp8_block: they cannot be computed as plain"):
        read.asked(2, None, format="plain")


def test_an_engine_holds_the_bytes_of_the_files(folder: Path) -> None:
    source = Source.open(str(folder), leaves=2)
    engine = Engine(source.config, EngineConfig(8, 8, True, Limits(2, 16, 16), source.dtype, "cpu"))
    leaves = engine.load(source.weights(), 0)
    tensors, expected = load_file(folder / "model.safetensors"), {}
    for p in saved(CONFIG):
        held = engine.runner.weights[p.name]
        if isinstance(held, Quantized):
            assert_same_bits(held.values, torch.cat([tensors[n] for n in p.hf_names]), p.name)
            assert_same_bits(held.scales, torch.cat([tensors[n + "_scale_inv"] for n in p.hf_names]).float(), p.name)
        else:
            assert_same_bits(held[: sum(p.stored)], torch.cat([tensors[n] for n in p.hf_names]), p.name)
        expected |= slice_digests(CONFIG, p, held, WHOLE)
    assert digest(leaves) == digest(expected)
    assert sum(isinstance(w, Quantized) for w in engine.runner.weights.values()) == 4


def test_a_trainer_starts_from_value_times_scale(folder: Path) -> None:
    """By rows, wherever they are cut, and whole; float32, each product rounded once."""
    where = find(CONFIG, folder)
    stored = {p.name: w for p, w in load_as_stored(CONFIG, folder)}
    for p, whole in load(CONFIG, folder):
        held = stored[p.name]
        if isinstance(held, Quantized):
            wide = held.scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
            assert_same_bits(whole, held.values.float() * wide, p.name)
            assert_same_bits(whole.bfloat16(), dequantize_blocks(held), p.name)
        rows = whole.shape[0]
        for cuts in ([0, rows], sorted({0, *(n for n in (1, 127, 129, rows // 2 + 3) if n < rows), rows})):
            parts = [read_rows(where, p, a, b) for a, b in pairwise(cuts)]
            assert_same_bits(torch.cat(parts), whole, p.name)


def test_quantized_again(folders: dict[torch.dtype, Path]) -> None:
    """Where a scale is what this format makes it, the bytes come back. Where it was rounded to bfloat16, as in Qwen's files,
    some do not: a trainer's first publication has other bits than the files, and both sides have them."""
    changed = {}
    for dtype, folder in folders.items():
        changed[dtype] = counted = [0, 0]
        for _, held in load_as_stored(CONFIG, folder):
            if isinstance(held, Quantized):
                again = quantize_blocks(dequantize_blocks(held))
                counted[0] += int((integers(again.values) != integers(held.values)).sum())
                counted[1] += int((integers(again.scales) != integers(held.scales)).sum())
                off = (dequantize_blocks(again).float() - dequantize_blocks(held).float()).abs()
                assert (off <= 2.0**-3 * dequantize_blocks(held).float().abs() + 2.0**-9 * held.scales.max()).all()
    assert changed[torch.float32] == [0, 0] and changed[torch.bfloat16][1] > 0


def test_a_trainer_scores_as_the_engine_that_loads_it(folder: Path) -> None:
    few = ["--trials", "2", "--new", "4", "--threads", "1", "--device", "cpu", "--mode", "trainer"]
    assert main([*few, "--model", str(folder), "--leaves", "2"]) == 0


def test_an_adapter_is_merged_into_what_a_trainer_starts_from(folder: Path) -> None:
    plain = dict((p.name, w) for p, w in load(CONFIG, folder))
    for p, tensor in load(CONFIG, folder, merged({}, torch.bfloat16)):
        assert_same_bits(tensor, plain[p.name].bfloat16(), p.name)


SAID: dict[str, tuple[Any, str]] = {
    "another method": (
        {"quant_method": "awq"},
        "quant_method='awq' is not supported; taken is quant_method=fp8, fmt=e4m3",
    ),
    "another type": ({"fmt": "e5m2"}, "fmt='e5m2' is not supported"),
    "other blocks": ({"weight_block_size": [64, 64]}, r"weight_block_size=\[64, 64\] is not supported"),
    "no blocks": ({"weight_block_size": None}, "weight_block_size=None is not supported"),
    "static activations": ({"activation_scheme": "static"}, "activation_scheme='static' is not supported"),
    "a field more": ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme=.* is not supported"),
    "a projection left out": (
        {"modules_to_not_convert": ["lm_head", "model.layers.0.mlp.down_proj"]},
        "names 'model.layers.0.mlp.down_proj', and model.layers.0.mlp.down_proj.weight is a projection",
    ),
    "all of a kind": (
        {"modules_to_not_convert": ["self_attn"]},
        "names 'self_attn', and model.layers.0.self_attn.q_proj",
    ),
    "no list": ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert='lm_head' must be a list"),
}


@pytest.mark.parametrize("name", SAID)
def test_other_quantizations_are_refused(name: str, folders: dict[torch.dtype, Path], tmp_path: Path) -> None:
    shutil.copytree(folders[torch.float32], tmp_path, dirs_exist_ok=True)
    changes, message = SAID[name]
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["quantization_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=message) as refused:
        Source.open(str(tmp_path), leaves=2)
    assert "\n" not in str(refused.value)


def test_scales_that_are_powers_of_two_name_the_other_format(folders: dict[torch.dtype, Path], tmp_path: Path) -> None:
    shutil.copytree(folders[torch.float32], tmp_path, dirs_exist_ok=True)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["quantization_config"]["scale_fmt"] = "ue8m0"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert ModelFolder(tmp_path).model(2).format == "fp8_block_ue8m0"


@pytest.mark.parametrize("what", ["no scales", "scales of another shape", "no quantization_config"])
def test_files_that_do_not_fit_are_refused(what: str, folders: dict[torch.dtype, Path], tmp_path: Path) -> None:
    shutil.copytree(folders[torch.float32], tmp_path, dirs_exist_ok=True)
    name, tensors = "model.layers.0.mlp.down_proj.weight", load_file(tmp_path / "model.safetensors")
    message = "is F8_E4M3; taken are"
    if what == "no quantization_config":
        fields = json.loads((tmp_path / "config.json").read_text())
        del fields["quantization_config"]
        (tmp_path / "config.json").write_text(json.dumps(fields))
    elif what == "no scales":
        del tensors[name + "_scale_inv"]
        message = f"{name} is F8_E4M3, and no file has its {name}_scale_inv"
    else:
        tensors[name + "_scale_inv"] = torch.ones(2, 3)
        message = rf"{name}_scale_inv is F32 \(2, 3\); of \(256, 256\) in blocks of 128 it must be \(2, 2\)"
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=message) as refused:
        Source.open(str(tmp_path), leaves=2)
    assert "\n" not in str(refused.value)
