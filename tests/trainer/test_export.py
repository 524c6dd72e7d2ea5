"""A checkpoint becomes a folder that transformers loads, with the bits of the masters, or nothing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, AutoTokenizer

from kernels.model import ModelConfig, costs, saved
from kernels.model.operations import Numerics
from kernels.tree import WHOLE
from kernels.weights.beside import Beside, Contract
from kernels.weights.digest import Leaves, digest, slice_digests
from kernels.weights.files import load
from kernels.weights.folder import ModelFolder
from rl.checkpoints import beside_files
from rl.data.tokenizer import of_characters
from tests.bits import assert_same_bits
from tests.model.shapes import SHAPES, random_weights
from trainer.checkpoint import complete, folder_name, read, shard_name
from trainer.export import export, main
from trainer.trainer import Trainer, TrainerConfig
from trainer.writer import ShardWriter


def checkpoint_of(name: str, root: Path, mesh: DeviceMesh, numerics: Numerics = "exact") -> Path:
    config = replace(SHAPES[name], numerics=numerics)
    trainer = Trainer(config, TrainerConfig(1, 1), mesh, random_weights(config))
    folder, final, writer = root / "temporary", root / "checkpoints" / folder_name(3), ShardWriter()
    folder.mkdir(parents=True)
    writer.start(folder / shard_name(0, 1), {k: t.clone() for k, t in trainer.shard().items()})
    file = writer.result(wait=True)
    assert file is not None
    final.parent.mkdir()
    tokenizer = of_characters("0123456789+-=")
    beside = Beside(Contract.of(config, torch.float32), tokenizer.fields, tokenizer.files)
    complete(folder, final, config, 0, "", [file], beside_files(beside, config), {})
    return final


def sha256(config: ModelConfig, dtype: torch.dtype) -> str:
    digests: Leaves = {}
    for p, w in random_weights(config):
        digests |= slice_digests(config, p, w.to(dtype), WHOLE)
    return digest(digests)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tiny", "tied", "llama 3.1", "61 ids", "experts, dense layers"])
def test_transformers_loads_it(
    name: str, dtype: str, mesh: DeviceMesh, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint_of(name, tmp_path, mesh)
    out, torch_dtype = tmp_path / "hf", getattr(torch, dtype)
    main([str(tmp_path), str(out), "--dtype", dtype])
    assert f"weights sha256 {sha256(SHAPES[name], torch_dtype)}" in capsys.readouterr().out
    hf = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert hf.dtype == torch_dtype
    weights = {p.name: w.to(torch_dtype) for p, w in random_weights(SHAPES[name])}
    assert_same_bits(hf.model.embed_tokens.weight, weights["embed"][: SHAPES[name].vocab_size])
    assert_same_bits(hf.model.layers[0].self_attn.o_proj.weight, weights["layers.0.o"])
    assert ModelFolder(out).model() == SHAPES[name]
    for p, w in load(SHAPES[name], out):
        assert_same_bits(w, weights[p.name], p.name)
    assert AutoTokenizer.from_pretrained(out)("1+2=", add_special_tokens=False)["input_ids"]


def test_a_contrast_run_says_so(mesh: DeviceMesh, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoint_of("tiny", tmp_path, mesh, numerics="fast")
    main([str(tmp_path), str(tmp_path / "hf")])
    assert capsys.readouterr().out.endswith(" (numerics=fast)\n")


def test_numbered_files_and_their_index(mesh: DeviceMesh, tmp_path: Path) -> None:
    config = SHAPES["tiny"]
    checkpoint = read(checkpoint_of("tiny", tmp_path, mesh))
    export(checkpoint, tmp_path / "hf", torch.float32, file_bytes=20_000)
    files = sorted(p.name for p in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "hf" / name).stat().st_size < 22_000 for name in files)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * costs.parameter_count(config)
    assert sorted(index["weight_map"]) == sorted(n for p in saved(config) for n in p.hf_names)
    assert sorted(set(index["weight_map"].values())) == files
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert_same_bits(hf.lm_head.weight, dict((p.name, w) for p, w in random_weights(config))["head"])


def test_bad_input_is_one_line_and_leaves_nothing(
    mesh: DeviceMesh, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = checkpoint_of("tiny", tmp_path, mesh)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    out = tmp_path / "hf"
    cases = [
        ((str(tmp_path / "none"), str(out)), "is neither a checkpoint nor a folder that holds any"),
        ((str(path), str(tmp_path / "full")), "exists already"),
        ((str(path), str(out), "--dtype", "int8"), "invalid choice: 'int8'"),
        ((str(path),), "the following arguments are required: out_dir"),
        ((str(path), str(tmp_path / "full" / "mine" / "x")), "could not be written: Not a directory"),
    ]
    shard = path / shard_name(0, 1)
    for arguments, part in cases:
        with pytest.raises(SystemExit) as end:
            main(arguments)
        err = capsys.readouterr().err
        assert err.startswith("samebit: error: ") and part in err and err.count("\n") == 1
        assert end.value.code == (1 if "written" in part else 2)
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(SystemExit) as end:
        main([str(path), str(out)])
    assert end.value.code == 2 and "was altered: sha256" in capsys.readouterr().err
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_into_a_link_and_the_present_folder(mesh: DeviceMesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written lies where the link points to, and the link stays."""
    checkpoint_of("tiny", tmp_path / "run", mesh)
    disk, link, here = tmp_path / "disk", tmp_path / "link", tmp_path / "here"
    disk.mkdir()
    here.mkdir()
    link.symlink_to(disk)
    main([str(tmp_path / "run"), str(link)])
    assert link.is_symlink() and (disk / "config.json").exists()
    monkeypatch.chdir(here)
    main([str(tmp_path / "run"), "."])
    assert (here / "config.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "here", "link", "run"]
