"""Text becomes the same ids for sampler and trainer, the same ids end it for both, and a saved model says so to others."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from kernels.weights.beside import Beside, Contract
from kernels.weights.files import save
from kernels.weights.folder import ModelFolder
from rollout.source import Source
from rollout.tokenizer import Tokenizer
from tests.model.shapes import random_weights
from tests.weights.folders import BEGIN, CHAT, CONFIG, END, ENDS, PAD, TURN, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    found = Tokenizer.of(ModelFolder(folder))
    assert found
    return found


TEXTS = st.text(max_size=20) | st.lists(st.sampled_from(["</s>", "<s>", "a ", "é"]), max_size=4).map("".join)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(text=TEXTS.filter(lambda t: not any("\ud800" <= c <= "\udfff" for c in t)))
def test_ids_are_those_of_transformers_and_of_every_process(tokenizer: Tokenizer, folder: Path, text: str) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(text)
    assert list(ids) == theirs(text)["input_ids"] and ids[0] == BEGIN
    part = tokenizer.encode(text, add_special_tokens=False)
    assert ids == (BEGIN, *part) and list(part) == theirs(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.completion(text) == (*part, END)
    other = pickle.loads(pickle.dumps(tokenizer))
    assert other.encode(text) == ids and other.ends == tokenizer.ends
    for special in (False, True):
        assert tokenizer.decode(ids, special) == other.decode(ids, special)
        assert tokenizer.decode(ids, special) == theirs.decode(ids, skip_special_tokens=not special)


def test_settings_of_a_training_script_cut_no_text(tmp_path: Path) -> None:
    """tokenizer.json may say how an earlier program cut and padded its batches."""
    path = write_folder(tmp_path) / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    fields["padding"] = {
        "strategy": {"Fixed": 30}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": PAD, "pad_type_id": 0,
        "pad_token": "<pad>",
    }  # fmt: skip
    path.write_text(json.dumps(fields))
    tokenizer = Tokenizer.of(ModelFolder(tmp_path))
    assert tokenizer and len(tokenizer.encode("ten letters")) == 12
    assert len(pickle.loads(pickle.dumps(tokenizer)).encode("ten letters")) == 12


def test_both_sides_read_one_directory(folder: Path, tmp_path: Path) -> None:
    """What `/generate` makes of a text, and what training makes of it; and where either stops."""
    from rl.compose import check
    from rl.data import open_source
    from rl.requests import eval_sampling, train_sampling

    (config,) = check([f"model.path={folder}", "data.problems=100"])
    trained, served = open_source(config), Source.open(str(folder))
    assert served.words and served.end_ids == ENDS == trained.tokenizer.ends
    for problem in trained.train:
        assert served.words.encode(problem.prompt) == problem.prompt_ids and problem.prompt_ids[0] == BEGIN
    for sampling in (train_sampling, eval_sampling):
        assert sampling(config, trained.tokenizer.ends).stop_ids == served.end_ids
    assert trained.encode_solution(trained.train[0])[-1] == END
    assert BEGIN not in trained.encode_solution(trained.train[0])


def test_the_server_answers_with_what_the_trainer_reads(folder: Path) -> None:
    from tests.rollout.server_process import running

    with running(f"model={folder}") as server:
        client = server.client()
        asked = {
            "text": "1+2=",
            "sampling_params": {"max_new_tokens": 3},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        meta = client.post("/generate", json=asked).json()["meta_info"]
        words = Source.open(str(folder)).words
        assert words
        ids = words.encode("1+2=")
        assert meta["prompt_tokens"] == len(ids) and tuple(t[1] for t in meta["input_token_logprobs"]) == ids
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        usage = client.post("/v1/chat/completions", json=chat).json()["usage"]
        assert usage["prompt_tokens"] == len(words.encode("<|turn|>hi<|turn|>", add_special_tokens=False))


def carried(folder: Path, out: Path) -> Path:
    tokenizer = Tokenizer.of(ModelFolder(folder))
    assert tokenizer
    save(CONFIG, random_weights(CONFIG), out, beside=Beside(Contract(8, "float32"), tokenizer.fields, tokenizer.files))
    return out


def test_all_that_was_said_of_tokens_is_carried(folder: Path, tmp_path: Path) -> None:
    out = carried(folder, tmp_path)
    before, after = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(out)
    assert after.chat_template == before.chat_template == CHAT and after.padding_side == before.padding_side == "left"
    assert after.all_special_tokens == before.all_special_tokens and after("a")["input_ids"] == before("a")["input_ids"]
    ours, theirs = ModelFolder(out), ModelFolder(folder)
    assert ours.ends == theirs.ends and ours.generation["temperature"] == 0.6
    for name in ("bos_token_id", "eos_token_id"):
        assert ours.fields[name] == theirs.fields[name]
    said = GenerationConfig.from_pretrained(out)
    assert said.eos_token_id == [TURN, END] and said.bos_token_id == BEGIN and said.pad_token_id == PAD
    assert carried(out, tmp_path / "again") and ModelFolder(tmp_path / "again").token_files() == ours.token_files()


def test_transformers_stops_where_we_do(folder: Path, tmp_path: Path) -> None:
    """With a tokenizer alone that names an end, too."""
    (write_folder(tmp_path / "bare") / "generation_config.json").unlink()
    fields = json.loads((tmp_path / "bare" / "config.json").read_text())
    for name in ("bos_token_id", "eos_token_id"):
        del fields[name]
    (tmp_path / "bare" / "config.json").write_text(json.dumps(fields))
    for source, ends in ((folder, ENDS), (tmp_path / "bare", (END,))):
        out = carried(source, tmp_path / "out" / source.name)
        opened = Source.open(str(out))
        assert opened.end_ids == ends
        model = AutoModelForCausalLM.from_pretrained(out)
        words = AutoTokenizer.from_pretrained(out)
        inputs = words(["a", "abc"], return_tensors="pt", padding=True)
        for end in ends:
            with torch.no_grad():
                model.lm_head.weight.zero_()
                model.model.norm.weight.zero_()
                model.lm_head.bias = torch.nn.Parameter(torch.nn.functional.one_hot(torch.tensor(end), 321).float())
            written = model.generate(**inputs, max_new_tokens=20, do_sample=False)
            assert written.shape[1] == inputs["input_ids"].shape[1] + 1, "it did not stop"


def test_a_directory_of_ids_alone(tmp_path: Path) -> None:
    """Without a tokenizer the configs still say what ends a text; training says what it misses."""
    from tests.rl.command import call

    write_folder(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).unlink()
    source = Source.open(str(tmp_path))
    assert source.words is None and source.decode is None and set(source.end_ids) == set(ENDS)
    assert "holds no tokenizer" in call(f"model.path={tmp_path}", "dry_run=true", "data.problems=100").error()


def test_no_end_at_all_is_told(tmp_path: Path) -> None:
    from tests.rl.command import call

    (write_folder(tmp_path) / "generation_config.json").unlink()
    for name, gone in (("config.json", "eos_token_id"), ("tokenizer_config.json", "eos_token")):
        fields: dict[str, Any] = json.loads((tmp_path / name).read_text())
        del fields[gone]
        (tmp_path / name).write_text(json.dumps(fields))
    assert Source.open(str(tmp_path)).end_ids == ()
    assert "name an eos token" in call(f"model.path={tmp_path}", "dry_run=true", "data.problems=100").error()


def test_code_of_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    """And nobody is asked on stdin whether it may."""
    path = write_folder(tmp_path) / "tokenizer_config.json"
    fields = json.loads(path.read_text()) | {
        "auto_map": {"AutoTokenizer": [None, "evil.Words"]},
        "tokenizer_class": "Words",
    }
    path.write_text(json.dumps(fields))
    (tmp_path / "evil.py").write_text("raise AssertionError('run')\n")
    source = Source.open(str(tmp_path))
    assert source.words and source.words.encode("a")[0] == BEGIN
