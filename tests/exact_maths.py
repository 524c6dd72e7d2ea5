"""Which calls leave a bit to a library that rounds as it likes, and where such a call may stand all the same.

torch and numpy compute elementary functions and sums by vector libraries that choose their code by CPU (MKL, SLEEF, SVML),
Python by libm. What IEEE 754 rounds (+, -, x, /, `math.sqrt`, conversions), whole numbers, and copies are the same everywhere
and are not looked at. `test_exact_maths.py` asks `refused` about every file that may decide a bit, and allows what is here.
"""

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

ALLOWED = {  # why: "file, function, what"
    "whole numbers: counts, lengths, offsets, digests modulo 2^64; int64, or Python's": (
        "kernels/weights/fingerprint.py fingerprint .sum",
        "rl/cluster/streams.py Streams._send sum",
        "rl/carry.py Taken.metrics sum",
        "rl/carry.py Carrying.compared np.cumsum",
        "rl/carry.py Carrying._enough sum",
        "rl/carry.py Carrying._take sum",
        "rl/publish.py _end sum",
        "kernels/model/costs.py outer_trained_elements sum",
        "kernels/weights/cargo.py factors_are_less sum",
        "rl/placement.py _all_have_one sum",
        "rl/train.py Parts._publish sum",
        "rollout/receiver.py Receiver.begin sum",
        "kernels/weights/routes.py serving sum",
        "rl/environments/games/calculator.py added sum",
        "rl/evaluation/sets.py _open sum",
        "rl/journal.py conversations sum",
        "rl/pack.py pack_demonstrations .sum",
        "rl/replay/kept.py Kept.differing .sum",
        "rl/replay/parting.py part .sum",
        "rl/replay/parting.py part np.cumsum",
        "rl/replay/sides.py trainer_side np.cumsum",
        "rl/replay/sides.py sampler_side np.cumsum",
        "rl/replay/sides.py sampler_side sum",
        "rl/replay/sides.py _steps np.cumsum",
        "kernels/model/blocks/attention.py costs sum",
        "kernels/model/blocks/mlp.py costs sum",
        "kernels/model/costs.py _spared sum",
        "kernels/model/costs.py active_parameters sum",
        "kernels/model/costs.py adapted_elements sum",
        "kernels/model/costs.py layer_trained_elements sum",
        "kernels/model/costs.py trained_elements sum",
        "kernels/ops/low_rank/__init__.py low_rank_gradients sum",
        "kernels/model/costs.py held_bytes sum",
        "kernels/model/costs.py layer_elements sum",
        "kernels/model/costs.py layer_saved_elements sum",
        "kernels/model/costs.py parameter_count sum",
        "kernels/model/costs.py saved_elements sum",
        "kernels/model/costs.py step_bytes sum",
        "kernels/model/costs.py token_bytes sum",
        "kernels/model/costs.py training_flops sum",
        "kernels/model/layout.py _offsets np.cumsum",
        "kernels/model/layout.py Layout.packed sum",
        "kernels/model/ahead.py _serve .cumsum",
        "kernels/model/ahead.py _train sum",
        "kernels/model/parameter.py Parameter.elements sum",
        "kernels/model/parameter.py Parameter.shape sum",
        "kernels/model/parameter.py Parameter.to_files sum",
        "kernels/ops/dispatch/cpu.py dispatch .cumsum",
        "kernels/ops/dispatch/cpu.py dispatch .sum",
        "kernels/ops/dispatch/cpu.py dispatch torch.bincount",
        "kernels/weights/files.py save sum",
        "kernels/weights/initial.py initial sum",
        "kernels/ops/embedding/cpu.py scatter .cumsum",
        "kernels/ops/embedding/cpu.py scatter torch.bincount",
        "trainer/routing.py Routing.__init__ sum",
        "trainer/routing.py Routing.told .scatter_add_",
        "trainer/routing.py Routing.told .sum",
        "trainer/routing.py RoutingReport.metrics .sum",
        "rl/rewards/answer.py _is_cheap sum",
        "rl/algorithms/shares.py loss_counts .sum",
        "rl/algorithms/shares.py weighed np.cumsum",
        "rl/algorithms/ppo.py Ppo.batch np.cumsum",
        "rl/plan.py make_plan sum",
        "rl/plan.py card_bytes sum",
        "trainer/memory.py trainer_memory sum",
        "rl/updates.py measure sum",
        "rl/journal.py compare np.cumsum",
        "rl/metrics.py  **",
        "rl/report/page.py facts sum",
        "rl/pack.py pack_supervised .sum",
        "rl/pack.py pack_supervised np.cumsum",
        "rl/plan.py _check_cards sum",
        "rl/prove.py against sum",
        "rl/publish.py _added sum",
        "rl/data/mixture.py Mixture.source sum",
        "rl/run/standing.py standing sum",
        "rl/publish.py _digest sum",
        "rl/samples.py sampled_counts sum",
        "rollout/differences.py compare sum",
        "rollout/drafts/history.py History.add sum",
        "rollout/drafts/speculation.py Speculation.taken sum",
        "rollout/engine.py Engine._measure sum",
        "rollout/memory.py Reclaimable.__init__ sum",
        "rollout/arrival.py _fingerprint .sum",
        "trainer/publisher.py Publisher._promise .sum",
        "rollout/server/openai.py Endpoint._usage sum",
        "rollout/server/tokens.py Tokens.whole sum",
        "rollout/server/service.py Call.__init__ sum",
        "rollout/server/service.py Service.call sum",
        "rollout/server/service.py Service.in_flight sum",
        "rollout/verify.py Verification.radix_cache sum",
        "rollout/verify.py Verification.tp sum",
        "rollout/verify.py Verification.trainer sum",
        "rollout/verify.py main sum",
        "trainer/batch.py Batch.__post_init__ .sum",
        "trainer/batch.py Batch._starts np.cumsum",
        "trainer/batch.py Batch.counts np.bincount",
        "trainer/batch.py Batch.sequence np.cumsum",
        "trainer/batch.py Batch.take np.cumsum",
        "trainer/batch.py Rows.merge np.cumsum",
        "trainer/batch.py _fits .sum",
        "trainer/batch.py cut_by_tokens .sum",
        "trainer/optimizer.py Optimizer._squares sum",
        "trainer/score.py read .sum",
        "trainer/model.py batch_logprobs np.cumsum",
        "trainer/score.py batch_of np.cumsum",
    ),
    "probabilities as whole multiples of 2^-40, below 2^60 in all": ("kernels/ops/truncate/cpu.py kept .cumsum",),
    "of tensors that hold anything: launches are compiled and none runs": ("kernels/model/ahead.py _train .sum",),
    "the largest number that a field may be": ("kernels/model/fields.py  **",),
    "metrics that decide no bit": (
        "trainer/routing.py Routing.told torch.log_softmax",
        "trainer/routing.py Routing.told .exp",
        "trainer/routing.py RoutingReport.metrics .mean",
        "trainer/routing.py RoutingReport.metrics .std",
        "rl/journal.py Journal.measure .mean",
    ),
    "seconds, for the log and the report": (
        "rl/clock.py busy_seconds sum",
        "rl/report/timeline.py Timeline.caption sum",
    ),
    "bytes of a step in the mean, for plans and benchmarks; it decides no bit": (
        "kernels/model/costs.py step_bytes **",
    ),
    "what an evaluation found: whole numbers and fractions, shown": (
        "rl/evaluation/measures.py _mean sum",
        "rl/evaluation/measures.py _pass_at **",
        "rl/evaluation/measures.py _pass_at sum",
        "rl/evaluation/measures.py interval **",
        "rl/evaluation/measures.py interval sum",
        "rl/evaluation/measures.py measure sum",
        "rl/evaluation/samples.py _rows sum",
    ),
    "fractions: whole numbers, which Python multiplies exactly": ("kernels/scalars.py root_of_power **",),
    "a proposal that whole numbers confirm or correct": ("kernels/scalars.py root_of_power math.pow",),
    "numpy's Philox alone, whose words numpy keeps from version to version (NEP 19)": (
        "rl/data/draws.py Draws.__init__ random.Philox",
    ),
    "what transformers computes where a run asks for it (algorithm.device_map), whose identity says so with its version": (
        "rl/hosted/language_model.py LanguageModel._of_one torch.log_softmax",
    ),
    "the project's own matmul and log-prob, by another name": (
        "kernels/model/decoder.py head_logits .matmul",
        "kernels/model/decoder.py token_values .matmul",
        "kernels/ops/logprob/__init__.py _LinearLogprob.forward .linear",
    ),
    "the loss that is reported; a step asks only whether it is finite, which no order of the sum changes": (
        "trainer/batch.py StepReport.merge sum",
        "trainer/trainer.py Trainer._backward .sum",
    ),
    "metrics, charts, and seconds: shown, and read by nothing that computes": (
        "rl/journal.py describe .mean",
        "rl/alone.py Alone.sample .mean",
        "rl/updates.py from_reference .mean",
        "rl/updates.py from_critic .var",
        "rl/updates.py from_critic sum",
        "rl/preferences.py Preferences.measure .mean",
        "rl/preferences.py Preferences.measure np.bincount",
        "rl/updates.py from_reference np.expm1",
        "rl/journal.py rewards .mean",
        "rl/journal.py rewards .std",
        "rl/journal.py describe np.mean",
        "rl/metrics.py _pearson .mean",
        "rl/metrics.py _pearson .sum",
        "rl/metrics.py _pearson np.sqrt",
        "rl/metrics.py divergence **",
        "rl/metrics.py divergence .mean",
        "rl/metrics.py divergence .sum",
        "rl/metrics.py divergence np.exp",
        "rl/metrics.py divergence np.expm1",
        "rl/metrics.py profile .sum",
        "rl/metrics.py profile np.exp",
        "rl/report/chart.py Chart.__init__ math.log10",
        "rl/report/chart.py Chart._bent math.log10",
        "rl/report/chart.py ticks **",
        "rl/report/chart.py ticks math.log10",
        "rl/report/sample.py _token math.exp",
    ),
    "where sympy tries whether two expressions are equal: Python's Mersenne Twister, which Python keeps": (
        "rl/rewards/answer.py same_answer random.seed",
    ),
    "a user's program may draw numbers: it shall draw the same ones every time": (
        "rl/rewards/sandbox.py  import random",
        "rl/rewards/sandbox.py main random.seed",
    ),
    "chooses what is tried; whatever it is has one result": (
        "rl/prove.py  import random",
        "rl/prove.py main random.sample",
        "rollout/verify.py  import random",
        "rollout/verify.py Verification._together random.randint",
        "rollout/verify.py Verification._together random.shuffle",
    ),
}


def _names(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


_FUNCTIONS = _names(  # of a library, or methods of a tensor, which then have no argument
    """exp exp2 expm1 log log2 log10 log1p sqrt rsqrt cbrt sin cos tan asin acos atan atan2 arcsin arccos arctan arctan2 sinh
    cosh tanh sigmoid logit erf erfc erfinv gamma lgamma pow power float_power reciprocal silu gelu softplus logaddexp hypot
    dist deg2rad rad2deg degrees radians sinc angle"""
)
_SUMS = _names(  # in an order of the library's choosing, of whatever
    """sum nansum mean nanmean std var average cumsum cumprod logcumsumexp prod norm dot vdot inner tensordot matmul mm mv bmm
    addmm addmv baddbmm einsum linear softmax log_softmax softmin logsumexp normalize layer_norm group_norm conv1d conv2d
    scaled_dot_product_attention cross_entropy cosine_similarity cov corrcoef trapezoid convolve correlate interp quantile
    percentile bincount histogram index_add index_add_ scatter_add scatter_add_"""
)
_RANDOM = _names(  # a stream that nobody promises, or a generator that the whole process shares
    """rand randn randint random choice choices shuffle permutation normal normal_ uniform uniform_ standard_normal bernoulli
    bernoulli_ multinomial exponential_ randperm default_rng Philox RandomState sample gauss manual_seed seed"""
)
_AMBIENT = {
    "set_flush_denormal",
    "set_default_dtype",
    "set_float32_matmul_precision",
    "compile",
}  # changes how others compute
_REFUSED = _FUNCTIONS | _SUMS | _RANDOM | _AMBIENT
_LIBRARIES = {"math", "np", "numpy", "torch", "F", "functional", "special", "linalg", "fft", "random"}
_IMPORTS = {"cmath", "random", "scipy", "statistics"}
_EXACT = {
    "math.sqrt",
    "math.prod",
    "np.random",
    "numpy.random",
}  # the nearest float64 (IEEE 754); whole numbers; a module


class Use(NamedTuple):
    function: str  # the outermost one that it stands in, with its class; "" outside
    name: str
    line: int


def refused(tree: ast.Module) -> Iterator[Use]:
    """Every use of such a function, sum, stream or switch, of `**` where a side is no whole number, and of `@`."""
    for function, node in _nodes(tree, ""):
        if (name := _name(node)) and name not in _EXACT:
            yield Use(function, name, node.lineno)  # type: ignore[attr-defined]


def _nodes(tree: ast.AST, function: str) -> Iterator[tuple[str, ast.AST]]:
    for child in ast.iter_child_nodes(tree):
        inside = function
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            outermost = not function or isinstance(tree, ast.ClassDef)
            inside = ".".join(filter(None, (function, child.name))) if outermost else function
        yield inside, child
        yield from _nodes(child, inside)


def _name(node: ast.AST) -> str:
    match node:
        case ast.Attribute(value=ast.Name(id=root) | ast.Attribute(attr=root), attr=name) if root in _LIBRARIES:
            return f"{root}.{name}" if name in _REFUSED else ""
        case ast.Call(func=ast.Attribute(attr=name), args=args):
            elementary = name.rstrip("_") in _FUNCTIONS and not args
            method = elementary or name in _SUMS or (name in _RANDOM and name[-1] == "_")
            return f".{name}" if method and not _name(node.func) else ""
        case ast.Call(func=ast.Name(id="sum" | "pow" as name)):
            return name
        case ast.BinOp(op=ast.Pow(), left=left, right=right):
            whole = all(isinstance(n, ast.Constant) and isinstance(n.value, int) for n in (left, right))
            return "" if whole else "**"
        case ast.AugAssign(op=ast.Pow()):
            return "**"
        case ast.BinOp(op=ast.MatMult()) | ast.AugAssign(op=ast.MatMult()):
            return "@"
        case ast.Import(names=names):
            return next((f"import {n.name}" for n in names if n.name.partition(".")[0] in _IMPORTS), "")
        case ast.ImportFrom(module=str(module), names=names) if module.partition(".")[0] in _LIBRARIES | _IMPORTS:
            strange = module.partition(".")[0] in _IMPORTS
            return next((f"{module}.{n.name}" for n in names if strange or n.name in _REFUSED), "")
        case _:
            return ""


_C_CALL = re.compile(
    r"\b((?:__builtin_)?(?:exp|exp2|expm1|exp10|log|log2|log10|log1p|pow|cbrt|hypot|sin|cos|tan|asin|acos|atan|atan2|sinh|cosh|tanh"
    r"|erf|erfc|lgamma|tgamma|rsqrt|rand|srand|random|drand48)[fl]?|_mm\d*_(?:rcp|rsqrt|exp|log|reduce)\w*|vrecpe\w*|vrsqrte\w*)\s*\("
)
_C_SWITCH = re.compile(r"\breduction\s*\(|fast-math|\bFP_CONTRACT\b|\bfloat_control\b|_MM_SET_\w+|\bfesetround\b")


def refused_in_c(text: str) -> list[str]:
    """libm's functions but for fma and sqrt, which IEEE 754 rounds; estimates; sums by OpenMP; switches of the arithmetic."""
    code = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)
    return [match[1] for match in _C_CALL.finditer(code)] + [match[0] for match in _C_SWITCH.finditer(code)]
