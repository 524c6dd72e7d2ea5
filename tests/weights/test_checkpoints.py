"""Model directories go to transformers and come back, and a broken one is an error of one line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kernels.model import ConfigError, ModelConfig, costs
from kernels.weights.files import load, save
from kernels.weights.folder import ModelFolder
from tests.bits import assert_same_bits
from tests.model.hugging_face import reference, reference_logits, units
from tests.model.shapes import SHAPES, TINY, packed_logits, prompts, random_weights
from tests.model.test_parity import BOUND, by_name


def written(config: ModelConfig, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    save(config, ((p, w.to(dtype)) for p, w in random_weights(config)), folder)
    return {p.name: w.to(dtype) for p, w in random_weights(config)}


def read(config: ModelConfig, folder: Path) -> dict[str, torch.Tensor]:
    return {p.name: w for p, w in load(config, folder)}


def assert_same_weights(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert_same_bits(actual[name], tensor, name)


@pytest.mark.parametrize(
    "name", ["tiny", "tied", "wide heads, odd widths", "experts, dense layers", "61 ids", "37 ids, tied"]
)
def test_what_is_saved_is_what_transformers_computes_with(name: str, tmp_path: Path) -> None:
    config = SHAPES[name]
    weights, sequences = written(config, tmp_path), prompts(config, [9, 30])
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(hf).__name__ == config.family.architecture and hf.dtype == torch.float32
    assert units(packed_logits(config, weights, sequences), reference_logits(hf, sequences)) < BOUND
    assert hf.num_parameters() == costs.parameter_count(config)
    assert_same_bits(hf.model.embed_tokens.weight, weights["embed"][: config.vocab_size])
    assert ModelFolder(tmp_path).model(config.leaves) == config
    assert_same_weights(read(config, tmp_path), weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_dtype_survives(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = written(TINY, tmp_path, dtype)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert_same_weights(read(TINY, tmp_path), weights)


@pytest.mark.parametrize(
    "name", ["tiny", "tied", "wide heads, odd widths", "experts, dense layers", "61 ids", "37 ids, tied"]
)
@pytest.mark.parametrize("shard_size", ["5GB", "40KB"])
def test_what_transformers_saves_is_loaded(name: str, shard_size: str, tmp_path: Path) -> None:
    config = SHAPES[name]
    weights = by_name(config)
    reference(config, weights).save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "40KB")
    assert ModelFolder(tmp_path).model(config.leaves) == config
    assert_same_weights(read(config, tmp_path), weights)


def test_no_file_names_the_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path} holds no .safetensors file"):
        read(TINY, tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        ModelFolder(tmp_path)


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.layers.1.self_attn.k_proj.weight", "model.norm.weight"])
def test_a_missing_tensor_is_named(lost: str, tmp_path: Path) -> None:
    written(TINY, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=f"has no tensor {lost}, which the config asks for"):
        read(TINY, tmp_path)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.self_attn.v_proj.weight", (33, 32), "(32, 32)"),
        ("model.layers.0.mlp.down_proj.weight", (64, 32), "(32, 64)"),  # the right count, the wrong way round
        ("model.norm.weight", (1, 32), "(32,)"),
    ],
)
def test_a_wrong_shape_is_named(name: str, shape: tuple[int, ...], expected: str, tmp_path: Path) -> None:
    written(TINY, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {name: torch.zeros(shape)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError) as error:
        read(TINY, tmp_path)
    message = str(error.value)
    assert name in message and str(shape) in message and expected in message and "\n" not in message


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    written(TINY, tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    for size in (0, 4, 8, 500, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ConfigError, match=r"model\.safetensors: not a readable safetensors file"):
            read(TINY, tmp_path)


def test_a_lost_shard_of_a_checkpoint_is_named(tmp_path: Path) -> None:
    reference(TINY, by_name(TINY)).save_pretrained(tmp_path, max_shard_size="40KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(ConfigError, match=r"index.json names model-00002-of-0000\d.safetensors, which is not there"):
        read(TINY, tmp_path)


def test_config_json_that_is_not_json_says_where(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{\n"model_type": "qwen3",\n')
    with pytest.raises(ConfigError, match=r"config\.json:3: not JSON"):
        ModelFolder(tmp_path)


@pytest.mark.parametrize("text", [b"[]", b"3", b"\xff"])
def test_config_json_that_is_no_object(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ConfigError, match=r"config\.json (must hold a JSON object|cannot be read)"):
        ModelFolder(tmp_path)


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    written(TINY, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=f"{name} is F8_E4M3; taken are F64, F32, F16, BF16"):
        read(TINY, tmp_path)


@pytest.mark.parametrize("limit", [1, 9000, 20000])
def test_files_are_as_large_as_allowed_and_none_is_empty(limit: int, tmp_path: Path) -> None:
    """But a tensor that is larger has a file of its own; and the next tensor would not have fitted."""
    save(TINY, random_weights(TINY), tmp_path, file_bytes=limit)
    sizes = [[t.nbytes for t in load_file(f).values()] for f in sorted(tmp_path.glob("model-*.safetensors"))]
    assert len(sizes) > 1 and all(size and (sum(size) <= limit or len(size) == 1) for size in sizes)
    assert_same_weights(read(TINY, tmp_path), {p.name: w for p, w in random_weights(TINY)})
