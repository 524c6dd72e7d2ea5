"""One reading of a model directory: which tensors, which contract, which ids end a text; and what is wrong with it."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kernels.model import ConfigError
from kernels.weights.beside import DTYPES, VERSION, Beside, Contract
from kernels.weights.files import find, load, save
from kernels.weights.folder import ModelFolder
from tests.bits import assert_same_bits
from tests.model.shapes import TINY, random_weights
from tests.weights.folders import CONFIG, END, TURN, write_folder

INDEX = "model.safetensors.index.json"


def indexed(folder: Path) -> Path:
    save(TINY, random_weights(TINY), folder, file_bytes=20_000)
    assert (folder / INDEX).exists()
    return folder


def halves(folder: Path, name: str, source: Path) -> None:
    """A file of the same tensors, all 0.5."""
    save_file({k: torch.full_like(t, 0.5) for k, t in load_file(source).items()}, folder / name)


def assert_read(folder: Path) -> None:
    for (p, actual), (_, expected) in zip(load(TINY, folder), random_weights(TINY), strict=True):
        assert_same_bits(actual, expected, p.name)


# tensors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model_old.safetensors", "zzz.safetensors", "adapter.safetensors"])
def test_a_file_that_the_index_does_not_name_is_not_read(name: str, tmp_path: Path) -> None:
    """Nor is a tensor of a file that it names, if it does not name that."""
    indexed(tmp_path)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    halves(tmp_path, name, files[0])
    first, last = load_file(files[0]), load_file(files[-1])
    save_file(last | {k: t * 2 for k, t in first.items()}, files[-1])
    assert_read(tmp_path)


def test_without_an_index_no_tensor_is_in_two_files(tmp_path: Path) -> None:
    save(TINY, random_weights(TINY), tmp_path)
    halves(tmp_path, "model_old.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(ConfigError) as error:
        find(TINY, tmp_path)
    assert "model.safetensors and in " in str(error.value) and "model_old.safetensors" in str(error.value)
    assert "no model.safetensors.index.json" in str(error.value)


def test_a_single_file_beside_an_index_is_told_of(tmp_path: Path) -> None:
    """transformers takes model.safetensors, whatever the index says."""
    indexed(tmp_path)
    assert ModelFolder(tmp_path).remarks(Contract(2, "float32")) == []
    halves(tmp_path, "model.safetensors", sorted(tmp_path.glob("model-*"))[0])
    assert_read(tmp_path)
    (line,) = ModelFolder(tmp_path).remarks(Contract(2, "float32"))
    assert line.startswith(f"{tmp_path}/model.safetensors is not read, as {INDEX} does not name it")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: {**m, "lm_head.weight": "lost.safetensors"}, "names lost.safetensors, which is not there"),
        (lambda m: {**m, "extra": m["lm_head.weight"]}, "has no tensor extra, which"),
        (lambda m: {k: v for k, v in m.items() if k != "lm_head.weight"}, "has no tensor lm_head.weight"),
        (lambda m: {**m, "lm_head.weight": "../x.safetensors"}, "must hold a weight_map"),
        (lambda m: {**m, "lm_head.weight": 3}, "must hold a weight_map"),
        (lambda m: [*m], "must hold a weight_map"),
        (lambda m: None, "must hold a weight_map"),
    ],
)
def test_an_index_that_says_what_is_not_so(change: Callable[[dict], Any], reason: str, tmp_path: Path) -> None:
    path = indexed(tmp_path) / INDEX
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"weight_map": change(index["weight_map"])}))
    with pytest.raises(ConfigError) as error:
        find(TINY, tmp_path)
    assert reason in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("model.layers.1.self_attn.q_proj.bias", True),
        ("model.layers.0.mlp.gate.weight", True),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", False),
        ("model.layers.2.self_attn.q_proj.weight", False),  # of a layer more than the config has
        ("v_head.summary.weight", False),
    ],
)
def test_a_tensor_that_would_change_the_model_is_not_passed_over(name: str, refused: bool, tmp_path: Path) -> None:
    save(TINY, random_weights(TINY), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {name: torch.ones(8)}, tmp_path / "model.safetensors")
    if not refused:
        return assert_read(tmp_path)
    with pytest.raises(ConfigError, match=f"holds {name}, which a qwen3 of this config has no use for"):
        find(TINY, tmp_path)


@pytest.mark.parametrize("row", [None, 0, 63])
def test_a_tied_model_has_one_head(row: int | None, tmp_path: Path) -> None:
    config = replace(TINY, tied=True)
    save(config, random_weights(config), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    if row is not None:
        head[row, 3] += 1
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    folder = ModelFolder(tmp_path)
    if row is None:
        assert folder.tensors(config)
        return
    with pytest.raises(
        ConfigError, match=r"lm_head.weight is not model.embed_tokens.weight, though .* tie_word_embeddings"
    ):
        folder.tensors(config)


# the contract -----------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded_by_its_own_contract(tmp_path: Path) -> None:
    beside = Beside(Contract(2, "bfloat16"), {"eos_token_id": 5}, {"note.txt": b"x"})
    save(TINY, random_weights(TINY), tmp_path, beside=beside)
    folder = ModelFolder(tmp_path)
    assert (
        folder.contract == Contract(2, "bfloat16", VERSION) == folder.asked(None, None) == folder.asked(2, "bfloat16")
    )
    assert folder.model() == TINY and folder.fields["torch_dtype"] == "float32" and folder.ends == (5,)
    assert folder.remarks(folder.asked(None, None)) == [] and (tmp_path / "note.txt").read_bytes() == b"x"
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.eos_token_id == 5
    (tmp_path / "model.safetensors").unlink()
    assert Beside.read(tmp_path) == beside


def test_another_contract_is_told(tmp_path: Path) -> None:
    save(TINY, random_weights(TINY), tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["samebit"]["contract"] = VERSION + 1
    (tmp_path / "config.json").write_text(json.dumps(fields))
    folder = ModelFolder(tmp_path)
    lines = folder.remarks(folder.asked(1, "bfloat16"), "--leaves")
    assert [line.removeprefix(f"{tmp_path}: ").partition(":")[0] for line in lines] == [
        f"the version of the arithmetic is {VERSION} and its contract says {VERSION + 1}",
        "--leaves is 1 and its contract says 2",
        "dtype is bfloat16 and its contract says float32",
    ]


def test_a_directory_without_a_contract(tmp_path: Path) -> None:
    folder = ModelFolder(write_folder(tmp_path))
    assert folder.contract is None and folder.remarks(Contract(1, "bfloat16", 7)) == []
    assert folder.asked(None, None) == Contract(8, "float32") and folder.asked(4, "bfloat16") == Contract(4, "bfloat16")
    assert folder.asked(None, None, otherwise="bfloat16").dtype == "bfloat16"
    assert folder.model() == CONFIG


@pytest.mark.parametrize(
    "said",
    [5, [], {}, {"contract": 1, "leaves": 3, "dtype": "float32"}, {"contract": True, "leaves": 8, "dtype": "float32"},
     {"contract": 1, "leaves": 8, "dtype": ["float32"]}, {"contract": 1, "leaves": 2**80, "dtype": "float32"}],
    ids=str,
)  # fmt: skip
def test_a_contract_that_is_none(said: object, tmp_path: Path) -> None:
    save(TINY, random_weights(TINY), tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"samebit": said}))
    with pytest.raises(ConfigError, match="is no contract; one is"):
        ModelFolder(tmp_path)


# files that are damaged -------------------------------------------------------------------------------------------------


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no UTF-8": lambda p: p.write_bytes(b'{"a": "\xff\xfe"}'),
    "nested": lambda p: p.write_text('{"a":' * 100_000 + "1" + "}" * 100_000),
    "nested and cut": lambda p: p.write_text("[" * 100_000),
    "a long number": lambda p: p.write_text('{"a": ' + "9" * 10_000 + "}"),
    "a list": lambda p: p.write_text("[]"),
    "empty": lambda p: p.write_text(""),
    "a pipe": pipe,
    "a folder": directory,
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX]
)
def test_a_damaged_file_is_named(name: str, how: str, tmp_path: Path) -> None:
    from rollout.tokenizer import Tokenizer

    path = write_folder(tmp_path) / name
    path.touch()
    DAMAGE[how](path)
    with pytest.raises(ConfigError) as error:
        folder = ModelFolder(tmp_path)
        folder.tensors(folder.model())
        assert folder.ends and Tokenizer.of(folder)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_ends_are_those_of_both_configs(tmp_path: Path) -> None:
    assert ModelFolder(write_folder(tmp_path)).ends == (TURN, END)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, -1]}')
    assert ModelFolder(tmp_path).ends == (7, END)
    (tmp_path / "generation_config.json").unlink()
    assert ModelFolder(tmp_path).ends == (END,)
    for said in ('"2"', "2.5", "true", "[[1]]", "{}"):
        (tmp_path / "generation_config.json").write_text('{"eos_token_id": ' + said + "}")
        with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id is .* it must be an id"):
            _ = ModelFolder(tmp_path).ends


def test_dtypes_are_those_of_torch() -> None:
    assert all(str(dtype) == f"torch.{name}" for name, dtype in DTYPES.items())


def test_a_copy_reads_alike(tmp_path: Path) -> None:
    """Through links too, as a hub's cache has them."""
    real, linked = write_folder(tmp_path / "real"), tmp_path / "linked"
    linked.mkdir()
    for path in real.iterdir():
        (linked / path.name).symlink_to(path)
    shutil.copytree(real, tmp_path / "copied")
    for other in (linked, tmp_path / "copied"):
        assert ModelFolder(other).token_files() == ModelFolder(real).token_files()
        assert ModelFolder(other).fields == ModelFolder(real).fields
