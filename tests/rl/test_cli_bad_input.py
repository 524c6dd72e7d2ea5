"""Bad input: one line that says what to change, exit code 2, nothing started, nothing written."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from kernels.model import ModelConfig
from kernels.weights.files import save
from kernels.weights.initial import initial
from rl.compose import check
from rl.data.tokenizer import of_characters
from tests.rl.command import ROOT, call, command

CASES = {
    "kernels of a GPU on a CPU": (["kernels.family=portable"], ["kernels.family=portable", "device=cuda"]),
    "a value for a group": (["rollout=5"], ["rollout=5: is a group of keys"]),
    "unknown key": (
        ("stpes=2",),
        ("unknown key 'stpes'", "did you mean steps?", "rollout, save_model, scoring, seed, steps"),
    ),
    "unknown key in a section": (("rollout.tpp=2",), ("'rollout.tpp'", "rollout.tp?", "prefill_chunk")),
    "added unknown key": (("+unknown=1",), ("unknown key 'unknown'", "align, batches, checkpoint, cluster")),
    "added unknown key in a section": (("+trainer.foo=1",), ("unknown key 'trainer.foo'", "world_size")),
    "key of another data group": (("data.path=x",), ("unknown key 'data.path'", "pattern")),
    "not an override": (("steps",), ("steps", "EQUAL")),
    "bad syntax": (('steps="2',), ("steps",)),
    "text that looks like the grammar": (
        ("data.prompt={0}{1}{2}{3}{4}=",),
        ("data.prompt={0}", "not an override", "data.prompt='...'"),
    ),
    "learning rate by another name": (("trainer.learning_rate=1",), ("'trainer.learning_rate'", "mean trainer.lr?)")),
    "added by another name": (("+trainer.learning_rate=1",), ("'trainer.learning_rate'", "mean trainer.lr?)")),
    "key without its section": (("lr=1",), ("unknown key 'lr'", "did you mean trainer.lr or warmup.lr?")),
    "key of another system": (("trainer.num_generations=4",), ("did you mean algorithm.group_size?",)),
    "glob over a key": (("seed=glob(*)",), ("seed=glob(*) stands for no value", "data, model, recipe")),
    "glob that finds nothing": (("-m", "model=glob(nope*)"), ("model=glob(nope*) stands for no value",)),
    "glob without -m": (("model=glob(*)",), ("5 runs", "add -m")),
    "interval": (("-m", "seed=interval(0,1)"), ("seed=interval(0,1)", "no values of its own")),
    "unknown launcher": (("hydra/launcher=nope",), ("hydra/launcher/nope", "basic")),
    "unknown launcher of a sweep": (("-m", "hydra/launcher=nope", "seed=0,1"), ("hydra/launcher/nope", "basic")),
    "unknown sweeper": (("hydra/sweeper=nope",), ("hydra/sweeper/nope", "basic")),
    "unknown key of Hydra": (("hydra.nope=1",), ("hydra.nope",)),
    "another config": (("-cn=x",), ("-cn=x", "configs/train.yaml", "+recipe=NAME")),
    "another folder of configs": (("--config-dir=x",), ("--config-dir=x", "configs/train.yaml")),
    "unknown flag": (("--dry-run",), ("unknown flag --dry-run",)),
    "unknown key of a config that is shown": (("--cfg", "job", "stpes=2"), ("unknown key 'stpes'", "mean steps?")),
    "home of nobody": (("out_dir=~nobody-of-that-name/x",), ("~nobody-of-that-name is no home",)),
    "home of nobody, quoted": (("resume='~nobody-of-that-name/x'",), ("resume=", "~nobody-of-that-name is no home")),
    "folder with a sign of the grammar": (("resume=/x/seed=0",), ("resume=/x/seed=0 is neither a checkpoint nor",)),
    "too many sequences": (
        ("dry_run=true", "algorithm.group_size=1e18"),
        ("algorithm.group_size=1000000000000000000", "32,000,000,000,000,000,000 sequences"),
    ),
    "too many sequences, by tokens": (
        ("dry_run=true", "algorithm.group_size=1e12", "trainer.micro_tokens=4096"),
        ("algorithm.group_size=1000000000000", "in one step"),
    ),
    "too many supervised sequences": (("warmup.sequences=1e18",), ("warmup.sequences=1000000000000000000", "in one")),
    "vocabulary that no memory holds": (("data=gsm8k", "data.path=x", "data.vocab_size=1e12"), ("data.vocab_size=",)),
    "more problems than can be drawn": (("data.problems=1e18",), ("data.problems=",)),
    "a coefficient of routers that are not there": (
        ("trainer.router_aux_loss_coef=0.1",),
        ("trainer.router_aux_loss_coef=0.1: the model has no experts",),
    ),
    "template without a field": (("data.prompt='Answer:'",), ("makes every prompt alike", "{0}, {1}")),
    "template without a field, escaped": (("data.prompt='{{0}}'",), ("makes every prompt alike", "{0}, {1}")),
    "template that drops a group": (("data.prompt='{0}{1}'",), ("makes one prompt of two problems", "'State the")),
    "task without answers": (
        (
            "data.task=rush_hour",
            *(f"~data.args.{m}_{n}" for m in ("min", "max") for n in ("terms", "digits")),
            "data.pattern='(?s)(.*)'",
            "data.prompt='{0}'",
            "data.problems=9",
        ),
        ("data.task=rush_hour gives no solution", "warmup.steps=0"),
    ),
    "task with an argument of a wrong type": (
        ("data.args.min_terms=many",),
        ("data.args of chain_sum", "given: min_terms"),
    ),
    "removed key": (("~seed",), ("seed is missing",)),
    "no interpolation": (("steps=${nope}",), ("nope",)),
    "bad type": (("steps=many",), ("steps='many'", "integer")),
    "out of range": (("seed=-1",), ("seed=-1", "greater than or equal to 0")),
    "infinite": (("rollout.temperature=inf",), ("rollout.temperature=inf", "finite")),
    "not a number": (("trainer.lr=nan",), ("trainer.lr=nan",)),
    "beta of 1": (("trainer.betas=[0.9,1.0]",), ("trainer.betas.1=1.0", "less than 1")),
    "section set to a value": (("rollout=3",), ("rollout=3",)),
    "tp does not divide heads": (("rollout.tp=8",), ("rollout.tp=8", "4 key-value heads")),
    "tp above leaves": (("rollout.tp=4", "model.leaves=2"), ("rollout.tp=4", "model.leaves=2")),
    "tp no power of two": (("rollout.tp=3",), ("rollout.tp=3", "power of two")),
    "leaves do not divide": (("model.hf.hidden_size=100",), ("hidden_size 100", "model.leaves=8")),
    "shape of a wrong type": (("model.hf.hidden_size=wide",), ("model.hf.hidden_size='wide'", "positive integer")),
    "shape of zero": (("model.hf.num_key_value_heads=0",), ("model.hf.num_key_value_heads=0", "positive")),
    "another architecture": (("model.hf.model_type=gemma",), ("'gemma' is not supported", "qwen3")),
    "batch arithmetic": (("algorithm.prompts_per_step=5",), ("trainer.leaf_sequences=", "no multiple of", "40 seq")),
    "warm start arithmetic": (("warmup.sequences=10",), ("10 sequences", "no multiple of")),
    "world size": (("trainer.world_size=3",), ("trainer.world_size=3", "power of two")),
    "unknown recipe": (("+recipe=nope",), ("unknown recipe 'nope'", "grpo_qwen3_8b, gsm8k_tiny")),
    "unknown model": (("model=nope",), ("unknown model 'nope'", "qwen3_0p6b")),
    "unknown data": (
        ("data=nope",),
        ("unknown data 'nope'", "arithmetic, dataset, gsm8k, mixture, numbered, reasoning_gym"),
    ),
    "no data path": (("data=gsm8k",), ("data.path has no value: set data.path=",)),
    "data path that does not exist": (("data=gsm8k", "data.path=/does/not/exist"), ("/does/not/exist",)),
    "unknown kind of data": (
        ("data.kind=nope",),
        ("data.kind='nope': must be one of 'reasoning_gym', 'dataset', 'numbered', 'mixture'",),
    ),
    "mixture of nothing": (("data=mixture",), ("data.sources={}", "at least 1 item")),
    "source that is none": (("data=mixture", "data.sources={a:3}"), ("data.sources.a=3",)),
    "source of no group": (("data=mixture", "data.sources={a:{data:x}}"), ("data.sources.a.data: unknown data 'x'",)),
    "source without its path": (("data=mixture", "data.sources={a:{}}"), ("data.sources.a.path has no value",)),
    "source with an unknown key": (
        ("data=mixture", "data.sources={a:{path:x,pth:1}}"),
        ("unknown key 'data.sources.a.pth'", "keys of data.sources.a: answer"),
    ),
    "source of a wrong type": (
        ("data=mixture", "data.sources={dataset:{path:x,chat:5}}"),
        ("data.sources.dataset.chat=5",),
    ),
    "source that cannot be read": (
        ("data=mixture", "data.sources={a:{path:/none}}"),
        ("data.sources.a: data.path=/none does not exist",),
    ),
    "name of a source": (
        ("data=mixture", "data.sources={a.b:{path:x}}"),
        ("data.sources.a.b='a.b': string should match",),
    ),
    "weight of no source": (
        ("data=mixture", "data.sources={a:{task:chain_sum,problems:50}}", "data.weights={b:1}"),
        ("data.weights.b: there is no such source; data.sources has a",),
    ),
    "weight of nothing": (
        ("data=mixture", "data.sources={a:{task:chain_sum}}", "data.weights={a:0}"),
        ("data.weights.a=0: input should be greater than 0",),
    ),
    "unknown task": (("data.task=nope",), ("data.task='nope'", "reasoning-gym")),
    "bad task argument": (("+data.args.foo=1",), ("data.args of chain_sum", "foo")),
    "bad pattern": (("data.pattern='('",), ("data.pattern", "unterminated")),
    "bad template": (("data.prompt='{x}'",), ("data.prompt='{x}'", "{0}, {1}")),
    "too few problems": (("data.problems=1",), ("0 held out", "more problems")),
    "no such reward module": (("reward=does_not_exist:f",), ("reward='does_not_exist:f'", "No module")),
    "no such reward function": (("reward=math:nope",), ("reward='math:nope'", "nope")),
    "reward without function": (
        ("reward=math",),
        ("reward='math' (module:function)", "exact, format, http, judge, length, model are built in"),
    ),
    "reward that raises": (("reward=tests.rl.command:raises",), ("KeyError", "boom", "problem '", "completion '")),
    "reward of NaN": (("reward=tests.rl.command:nan",), ("nan, not a number", "problem '", "completion '")),
    "reward that overflows": (
        ("reward=tests.rl.command:huge",),
        ("-1e+308, beyond 1e+30", "problem '", "completion '"),
    ),
    "reward of nothing": (("reward=tests.rl.command:none",), ("tests.rl.command:none leaves all", "returns None")),
    "reward of two numbers": (("reward=tests.rl.command:pair",), ("TypeError", "problem '", "completion '")),
    "reward of no known style": (
        ("reward=tests.rl.command:strange",),
        ("takes (whatever)", "(problem, text), TRL's (prompts, completions"),
    ),
    "reward that is none": (("reward=tests.rl.command:ROOT",), ("reward='tests.rl.command:ROOT'", "not callable")),
    "reward file that does not exist": (("reward=no/such.py:f",), ("reward='no/such.py:f'", "No such file")),
    "reward with a misspelt key": (
        ("reward=[{function:format,wieght:2}]",),
        ("no key 'wieght' (did you mean weight?)",),
    ),
    "rewards of one name": (("reward=[math:exp,cmath:exp]",), ("cmath:exp", "give it a `name`")),
    "reward with an argument that it has not": (
        ("reward=[{function:format,args:{patern:x}}]",),
        ("reward='format'", "patern"),
    ),
    "one bad reward of several": (("reward=[format,tests.rl.command:raises]",), ("the reward raises raised KeyError",)),
    "reward of no weight's range": (("reward=[{function:format,weight:1e9}]",), ("reward.0.weight=", "1000000")),
    "no such policy of errors": (("scoring.errors=zero",), ("scoring.errors='zero'", "'fail' or 'drop'")),
    "reward that is always dropped": (
        ("reward=tests.rl.command:raises", "scoring.errors=drop"),
        ("the reward raises raised KeyError",),
    ),
    "reward that leaves": (("reward=tests.rl.command:leaves",), ("raised SystemExit: 3", "problem '", "completion '")),
    "reward that dies": (("reward=tests.rl.command:dies",), ("ended its process (exit code 3)", "completion '")),
    "reward that crashes": (("reward=tests.rl.command:crashes",), ("signal 11, Segmentation fault", "completion '")),
    "reward whose child lives on": (("reward=tests.rl.command:forks",), ("(exit code 4)", "completion '")),
    "reward that raises oddly": (("reward=tests.rl.command:odd",), ("raised Odd", "completion '")),
    "nothing at the address": (("cluster.address=127.0.0.1:1",), ("cluster.address=127.0.0.1:1", "refused")),
    "too little memory": (("rollout.pages=100000000000",), ("GiB is free", "lower rollout.pages")),
    "prompt too long": (("model.hf.max_position_embeddings=8",), ("exceed the model's 8 positions", "max_new_tokens=")),
    "too few pages": (("rollout.pages=2",), ("rollout.pages=2",)),
    "vocabulary too small": (("model.hf.vocab_size=8", "model.leaves=1", "rollout.tp=1"), ("tokens", "vocabulary 8")),
    "no GPU implementation": (("device=cuda",), ("device=cuda", "device=cpu")),
    "no model folder": (("model.path=/does/not/exist",), ("model.path=/does/not/exist",)),
    "no out_dir": (("out_dir=",), ("out_dir=''",)),
    "model path of an empty variable": (("model.path=",), ("model.path=''",)),
    "data path of an empty variable": (("data=gsm8k", "data.path="), ("data.path=''",)),
    "path that no file can have": (("data=gsm8k", f"data.path={'x' * 5000}"), ("data.path=xxx", "too long")),
    "no marker": (("data=gsm8k", "data.path=x", "data.marker="), ("data.marker=''",)),
    "temperature that no request may have": (("rollout.temperature=0.0001",), ("rollout.temperature=0.0001", "0.001")),
    "the same of the evaluation": (("eval.temperature=1e9",), ("eval.temperature=1000000000.0", "at most 1000000")),
    "more threads than a process can have": (("trainer.threads=1000000",), ("trainer.threads=1000000", "512")),
    "template with an attribute": (
        ("data.prompt='{0.foo}'",),
        ("data.prompt='{0.foo}'", "'0.foo' is an attribute", "it may use {0}"),
    ),
    "template with an item": (("data.prompt='{0[a]}'",), ("data.prompt='{0[a]}'", "it may use {0}")),
    "empty template": (("data.prompt=''",), ("the prompt of problem '' is empty: data.prompt=''",)),
    "arguments of another task": (
        ("data.args={min_animals:2}",),
        ("data.args of chain_sum", "min_animals", "~data.args.NAME removes one"),
    ),
    "infinite epsilon": (("model.hf.rms_norm_eps=inf",), ("model.hf.rms_norm_eps=inf", "positive")),
    "deviation that is no number": (("model.hf.initializer_range=nan",), ("model.hf.initializer_range=nan",)),
    "deviation that is a text": (("model.hf.initializer_range=wide",), ("model.hf.initializer_range='wide'",)),
    "no positions": (("model.hf.max_position_embeddings=null",), ("model.hf.max_position_embeddings=None",)),
    "tied to a text": (("model.hf.tie_word_embeddings=maybe",), ("model.hf.tie_word_embeddings='maybe'",)),
    "sweep without -m": (("seed=0,1",), ("2 runs", "add -m")),
    "sweep with a bad last value": (("-m", "rollout.tp=2,8"), ("rollout.tp=8", "key-value heads")),
    "sweep with a bad reward": (("-m", "reward=tests.rl.command:length,tests.rl.command:nan"), ("nan, not a",)),
}


@pytest.fixture
def refused(tmp_path: Path) -> Iterator:
    """The error of a command that must leave nothing; its arguments come first, so that a test may override out_dir."""
    folder = tmp_path / "run"

    def run(*arguments: str) -> str:
        flags = [a for a in arguments if a == "-m"]
        rest = [a for a in arguments if a != "-m"]
        line = call(*flags, "logger=none", f"out_dir={folder}", *rest).error()
        assert not folder.exists()
        return line

    yield run


@pytest.mark.parametrize("case", CASES)
def test_bad_input(refused, case: str) -> None:
    arguments, parts = CASES[case]
    small = () if any("data" in a or "recipe" in a or "--" in a for a in arguments) else ("data.problems=100",)
    line = refused(*arguments, *small)
    for part in parts:
        assert part in line


GOOD = '{"question": "1 and 1?", "answer": "It is\\n#### 2"}\n'
FILES = {
    "empty": ("", "is empty"),
    "blank": ("\n \n", "is empty"),
    "malformed": (GOOD + "{\n" + GOOD, ".jsonl:2: not a JSON object"),
    "half a line": (GOOD + GOOD[:20], ".jsonl:2: not a JSON object"),
    "not an object": (GOOD + "[1]\n", ".jsonl:2: no text field 'question'"),
    "missing field": (GOOD * 2 + '{"question": "?"}\n', ".jsonl:3: no text field 'answer'"),
    "field of another type": (GOOD + '{"question": "?", "answer": 5}\n', ".jsonl:2: no text field 'answer'"),
    "no marker": (GOOD + '{"question": "?", "answer": "2"}\n', ".jsonl:2: the answer has no '####'"),
    "no result": (GOOD + '{"question": "?", "answer": "2 #### "}\n', ".jsonl:2: the answer has no result"),
    "half a surrogate pair": (
        GOOD + '{"question": "\\ud800", "answer": "####2"}\n',
        ".jsonl:2: field 'question' holds half a",
    ),
    "number of 5000 digits": (GOOD + f'{{"question": {"1" * 5000}}}\n', ".jsonl:2: cannot be read: Exceeds the limit"),
    "not UTF-8": (GOOD + '{"question": "\udcff", "answer": "####2"}\n', ".jsonl:2: not JSON in UTF-8"),
}


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("split", ["train", "test", "one file"])
def test_bad_file(refused, tmp_path: Path, case: str, split: str) -> None:
    text, part = FILES[case]
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "test"):
        bad = name == split or split == "one file"
        (data / f"{name}.jsonl").write_text(text if bad else GOOD, errors="surrogateescape")
    path = data / "train.jsonl" if split == "one file" else data
    line = refused("data=gsm8k", f"data.path={path}")
    assert part in line and ("test" if split == "test" else "train") in line


def test_bad_parquet(refused, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    data = tmp_path / "data.parquet"
    data.write_bytes(b"PAR1 not really")
    assert "not a readable parquet file" in refused("data=gsm8k", f"data.path={data}")
    pyarrow.parquet.write_table(pyarrow.table({"question": ["?"], "solution": ["#### 2"]}), data)
    line = refused("data=gsm8k", f"data.path={data}")
    assert "data.parquet:1: no text field 'answer'; the fields are question, solution" in line
    pyarrow.parquet.write_table(pyarrow.table({"question": ["?", "?"], "answer": ["#### 2", None]}), data)
    assert "data.parquet:2: no text field 'answer'" in refused("data=gsm8k", f"data.path={data}")


def test_folder_without_a_split(refused, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(GOOD)
    assert "holds no test.jsonl" in refused("data=gsm8k", f"data.path={tmp_path}")


def test_model_folder(refused, tmp_path: Path) -> None:
    """Without tokenizer, without config, with a config that is not JSON, without weights: each is said."""
    path = tmp_path / "model"
    path.mkdir()
    assert "config.json does not exist" in refused(f"model.path={path}")
    (path / "config.json").write_text('{\n"model_type": }')
    assert "config.json:2: not JSON" in refused(f"model.path={path}")
    (path / "config.json").write_text("{}")
    assert "no tokenizer" in refused(f"model.path={path}")
    shape = dict(check([])[0].model.hf) | {"vocab_size": 32}
    model = ModelConfig.from_hf(shape, 8)
    (path / "config.json").write_text(json.dumps(model.to_hf()))
    for text, said in (("{", "tokenizer.json:1: not JSON"), ("{}", "tokenizer cannot be loaded")):
        (path / "tokenizer.json").write_text(text)
        assert said in refused(f"model.path={path}")
    for name, content in of_characters(["0123456789+-="]).files.items():
        (path / name).write_bytes(content)
    assert "no .safetensors" in refused(f"model.path={path}")
    save(model, initial(model, 0), path)
    tensors = load_file(path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, path / "model.safetensors")
    assert "no tensor lm_head.weight" in refused(f"model.path={path}")


def test_prompts_that_are_too_long_or_empty(refused, tmp_path: Path) -> None:
    """The second would end the run in the step that draws it."""
    rows = [{"question": f"{i} and 1?" * (i > 0), "answer": f"#### {i + 1}"} for i in range(40)]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = refused("data=gsm8k", f"data.path={path}", "data.max_prompt_tokens=1")
    assert "0 held out, 40 left out for prompts above data.max_prompt_tokens: raise data.max_prompt_tokens" in line
    line = refused("data=gsm8k", f"data.path={path}", "data.prompt='{question}'")
    assert "the prompt of problem 'sums.jsonl:1' is empty" in line


def test_port_in_use(refused) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        line = refused(f"cluster.port={port}", "data.problems=100")
    assert f"port {port} is in use" in line and "set another or 0" in line


def test_out_dir(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 0\n")
    assert "holds a run already" in call("logger=none", "data.problems=100", f"out_dir={run}").error()
    assert [p.name for p in run.iterdir()] == ["config.yaml"]
    file = tmp_path / "file"
    file.write_text("mine")
    for path in (file, file / "below"):
        assert f"{file} is a file" in call("logger=none", "data.problems=100", f"out_dir={path}").error()
    assert file.read_text() == "mine"


def test_sweep_with_a_taken_folder(tmp_path: Path) -> None:
    (tmp_path / "seed=1").mkdir()
    (tmp_path / "seed=1" / "config.yaml").write_text("seed: 1\n")
    line = call("-m", "seed=0,1", "logger=none", "data.problems=100", f"out_dir={tmp_path}").error()
    assert "seed=1 holds a run already" in line
    assert [p.name for p in tmp_path.iterdir()] == ["seed=1"]


def test_as_a_process(tmp_path: Path) -> None:
    with command("-m", "seed=0,1", "rollout.tp=2,8", "data.problems=100", "out_dir=run", cwd=tmp_path) as running:
        assert "rollout.tp=8" in running.finish().error()
        assert running.family() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("kernels", "rl.train"),
        ("rollout", "rl.train"),
        ("trainer", "rl.prove"),
        ("kernels", "rollout.verify"),
        ("kernels", "trainer.export"),
    ],
)
@pytest.mark.parametrize("kind", ["file", "package"])
def test_a_file_that_hides_a_package(tmp_path: Path, name: str, module: str, kind: str) -> None:
    """`python -m` looks into the working folder first. (Where it holds the command's own package, Python itself says so.)"""
    file = tmp_path / f"{name}.py" if kind == "file" else tmp_path / name / "__init__.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text("raise RuntimeError('imported')\n")
    result = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2, result
    assert (
        result.stderr.startswith(f"samebit: error: {file} hides the package {name!r}")
        and result.stderr.count("\n") == 1
    )


def test_a_folder_that_hides_nothing(tmp_path: Path) -> None:
    """A folder without modules of its own is no package."""
    (tmp_path / "trainer").mkdir()
    with command("dry_run=true", "data.problems=100", cwd=tmp_path) as running:
        assert running.finish().code == 0


def test_another_package_named_kernels(tmp_path: Path) -> None:
    """transformers knows an optional package of that name."""
    info = tmp_path / "kernels-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 9.9\n")
    result = subprocess.run(
        [sys.executable, "-m", "rl.train", "dry_run=true"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and "pip uninstall kernels" in result.stderr and "Traceback" not in result.stderr
