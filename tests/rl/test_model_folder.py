"""Runs of a model directory: what they read of it, what they say before they start, and what they leave."""

import json
import os
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from kernels.weights.beside import Contract
from kernels.weights.files import save
from kernels.weights.folder import ModelFolder
from rl.compose import check
from rl.config import RunConfig
from rollout.source import Source
from rollout.tokenizer import Tokenizer
from tests.model.shapes import random_weights
from tests.rl.command import call, command
from tests.weights.folders import BEGIN, CONFIG, ENDS, write_folder
from trainer.export import main as export
from trainer.score import main as score

FEW = ("data.problems=100", "logger=none", "rollout.tp=1")


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def with_contract(folder: Path, leaves: int = 4, dtype: str = "bfloat16") -> Path:
    fields = json.loads((folder / "config.json").read_text()) | Contract(leaves, dtype).fields()
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def test_a_dry_run_shows_what_the_model_reads_and_where_it_stops(tmp_path: Path, wide: None) -> None:
    for prompt in (
        "[b]{0}{1}{2}{3}{4}[/b] [/INST]",
        "{0}{1}{2}{3}{4}" * 16,
    ):  # what a terminal's markup would swallow; what no line holds
        out = call(f"model.path={write_folder(tmp_path)}", *FEW, "dry_run=true", f"data.prompt='{prompt}'").out
        (config,) = check([f"model.path={tmp_path}", *FEW, f"data.prompt='{prompt}'"])
        ids, words = first_prompt(config)
        assert ids[0] == BEGIN
        flat = " ".join(out.replace("│", " ").split())
        assert f"'{words.decode(ids, special=True)[:100]}" in flat and " ".join(map(str, ids[:20])) in flat
        assert "257 '</s>', 258 '<|turn|>'" in flat


def first_prompt(config: RunConfig) -> tuple[tuple[int, ...], Tokenizer]:
    from rl.data import open_source

    source = open_source(config)
    return source.train[0].prompt_ids, source.tokenizer


def test_a_dry_run_without_data_says_so(wide: None) -> None:
    assert "the data was not read" in call("+recipe=grpo_qwen3_8b", "data.path=none", "dry_run=true").out


def test_the_contract_of_the_model_is_the_default(tmp_path: Path, wide: None) -> None:
    path = with_contract(write_folder(tmp_path))
    for model in ("tiny", "qwen3_8b"):  # the second names a dtype, and no leaves
        (config,) = check([f"model={model}", f"model.path={path}", *FEW])
        assert config.model.leaves == 4 and config.model.dtype == "bfloat16"
    outcome = call(f"model.path={path}", *FEW, "dry_run=true")
    assert outcome.code == 0 and outcome.err == "" and "exact, 4 leaves" in outcome.out
    asked = call(f"model.path={path}", *FEW, "dry_run=true", "model.leaves=8", "model.dtype=float32")
    assert asked.code == 0 and asked.err.splitlines() == [
        f"samebit: warning: {path}: model.leaves is 8 and its contract says 4: its log-probs have other bits",
        f"samebit: warning: {path}: model.dtype is float32 and its contract says bfloat16: its log-probs have other bits",
    ]
    (plain,) = check([*FEW])
    assert plain.model.leaves == 8 and plain.model.dtype == "auto"


def test_every_command_says_that_it_computes_by_another_contract(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    from rollout.serve import main as serve
    from rollout.verify import main as verify

    path = tmp_path / "model"
    save(CONFIG, random_weights(CONFIG), path)
    batch = {"token_ids": np.arange(9), "lengths": np.array([9]), "prompts": np.array([2]), "temperatures": np.ones(1)}
    batch |= {"top_k": np.zeros(1, int), "top_p": np.ones(1), "min_p": np.zeros(1)}
    np.savez(tmp_path / "batch.npz", **batch)
    scores = {}
    for options in ((), ("--leaves=8", "--dtype=float32"), ("--leaves=4",), ("--dtype=bfloat16",)):
        out = str(tmp_path / "out.npy")
        monkeypatch.setattr("sys.argv", ["score", str(path), str(tmp_path / "batch.npz"), out, *options])
        score()
        said = capsys.readouterr().err
        assert ("contract says" in said) == (options[:1] in (("--leaves=4",), ("--dtype=bfloat16",))), options
        scores[options] = np.load(out).tobytes()
    assert scores[()] == scores["--leaves=8", "--dtype=float32"] and len({*scores.values()}) == 3
    for argument, told in ((), 0), (("leaves=4",), 1), (("leaves=4", "dtype=bfloat16"), 2):
        with pytest.raises(SystemExit):
            serve([f"model={path}", *argument, "host=a..b"])
        assert capsys.readouterr().err.count("contract says") == told
    assert verify(["--model", str(path), "--leaves", "4", "--new", "1000"]) == 2
    assert f"{path}: leaves is 4 and its contract says 8" in capsys.readouterr().err


REFUSED = {
    "model.hf.num_hidden_layers=1180591620717411303424": "must be at most 16384",
    "model.hf.rms_norm_eps=1e23": "model.hf.rms_norm_eps=1e+23 must be a positive number from 2^-126 to 1",
    "model.hf.rms_norm_eps=1e-300": "which float32 holds",
    "model.hf.rope_theta=1e300": "which float32 holds",
    "+model.hf.attn_logit_softcapping=50.0": "model.hf.attn_logit_softcapping=50.0 is not understood",
    "+model.hf.num_experts=8": "model.hf.num_experts=8 is not understood",
    "+model.hf.layer_types=[full_attention,sliding_attention,full_attention]": "layer_types",
    "+model.hf.hiden_size=64": "model.hf.hiden_size=64 is not understood",
    "+model.hf.eos_token_id=3": "model.hf.eos_token_id=3: random weights have the ids of the data's tokenizer",
}


@pytest.mark.parametrize("override", REFUSED)
def test_overrides_of_the_shape_are_read_as_a_config_is(override: str) -> None:
    for data in ((), ("model.hf.vocab_size=64",)):  # with the data read, and without it
        assert REFUSED[override] in call(override, *FEW, *data, "dry_run=true").error()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b'{"a":' * 100_000 + b"1" + b"}" * 100_000], ids=["no UTF-8", "nested"]
)
def test_a_damaged_file_of_the_model_is_a_line(name: str, content: bytes, tmp_path: Path) -> None:
    (write_folder(tmp_path) / name).write_bytes(content)
    assert str(tmp_path / name) in call(f"model.path={tmp_path}", *FEW, "dry_run=true").error()


@pytest.mark.slow
def test_a_run_leaves_what_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory with a begin of text, two ends, a chat template and 321 ids, trained on 2 ranks, sampled on 4, exported."""
    given = write_folder(tmp_path / "given")
    arguments = ("steps=1", "warmup.steps=1", "warmup.sequences=32", "algorithm.prompts_per_step=4", "eval.problems=4")
    ranks = ("trainer.leaf_sequences=4", "trainer.micro_leaves=2", "rollout.tp=4", "trainer.world_size=2")
    with command(f"model.path={given}", *arguments, *ranks, *FEW[:2], "out_dir=run", cwd=tmp_path) as running:
        outcome = running.finish()
    assert outcome.code == 0 and outcome.err == "", outcome
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["tokens_nonzero"] == 0 and summary["tokens_compared"] > 30
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["leaves"] == 8
    export([str(tmp_path / "run"), str(tmp_path / "exported")])
    export([str(tmp_path / "run"), str(tmp_path / "half"), "--dtype", "bfloat16"])
    before = ModelFolder(given)
    for name, dtype in (("run/model", "float32"), ("exported", "float32"), ("half", "bfloat16")):
        after = ModelFolder(tmp_path / name)
        assert after.contract == Contract(8, dtype) and after.ends == before.ends == ENDS[::-1]
        assert after.token_fields == before.token_fields | {"pad_token_id": 259}
        assert {n: c for n, c in after.token_files().items() if n != "generation_config.json"} == {
            n: c for n, c in before.token_files().items() if n != "generation_config.json"
        }
        assert before.generation.items() <= after.generation.items()
        assert load_file(tmp_path / name / "model.safetensors")["lm_head.weight"].shape == (321, 32)
        assert after.fields["vocab_size"] == 321 and after.remarks(after.asked(None, None)) == []
        source = Source.open(os.fspath(tmp_path / name))
        assert source.config == CONFIG and source.end_ids == ENDS
    tensors = [load_file(tmp_path / name / "model.safetensors") for name in ("run/model", "exported")]
    assert tensors[0].keys() == tensors[1].keys() and all((tensors[0][k] == tensors[1][k]).all() for k in tensors[0])
