"""Top-k, top-p and min-p from logits to log-probs, gradients and draws. The filters themselves have their contract in
test_contract."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.ops import Truncation, gumbel_argmax, linear_logprob, matmul, truncate, vocab_logprob, vocab_nodes
from kernels.ops.truncate import ROWS as AT_ONCE
from kernels.ops.truncate.cpu import weights
from tests.bits import assert_same_bits

ROWS, LEAVES = 24, 8
FILTERS = st.tuples(
    st.sampled_from([0, 1, 2, 7, 30, 10**6]), st.sampled_from([1.0, 0.95, 0.6, 1e-6]), st.sampled_from([0.0, 0.05, 0.6])
)
SOME = st.lists(st.none() | FILTERS, min_size=ROWS, max_size=ROWS)
Filter = tuple[int, float, float]


class Scene:
    """Hidden states over a head, some of whose rows are cut, and a token for each row that it may draw."""

    def __init__(self, filters: list[Filter | None], columns: int, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        width, dtype = (512, torch.bfloat16) if device.type == "cuda" else (64, torch.float32)
        self.x = torch.randn(ROWS, width, generator=generator).to(device, dtype)
        self.head = (2 * torch.randn(columns * LEAVES, width, generator=generator) / width**0.5).to(device, dtype)
        self.temperature = (torch.rand(ROWS, generator=generator) + 0.5).to(device)
        self.truncation = truncation(filters).to(device)
        self.groups = torch.tensor([0, ROWS // 3, ROWS], device=device)
        self.logits = matmul(self.x, self.head, LEAVES, out_dtype=torch.float32)
        self.cut = self.logits.clone()
        truncate(self.cut, self.temperature, self.truncation)
        likely = torch.rand(self.cut.shape, generator=generator).to(device) * (self.cut > -torch.inf)
        self.targets = likely.argmax(1)

    def logprob(self, rows: list[int] | slice = slice(None), cut: Truncation | None = None) -> torch.Tensor:
        return linear_logprob(self.x[rows], self.head, self.targets[rows], self.temperature[rows], LEAVES, None, cut)

    def gradients(self, cut: Truncation | None) -> tuple[torch.Tensor, ...]:
        """Log-probs, and the gradients of a weighted sum of them to x and head."""
        x, head = self.x.clone().requires_grad_(), self.head.clone().requires_grad_()
        out = linear_logprob(x, head, self.targets, self.temperature, LEAVES, self.groups, cut)
        weights = torch.linspace(-1, 2, ROWS, device=out.device)
        return (out.detach(), *torch.autograd.grad(out, (x, head), weights))


def truncation(filters: list[Filter | None]) -> Truncation:
    cut = [(i, *f) for i, f in enumerate(filters) if f]
    whole = torch.tensor([c[:2] for c in cut], dtype=torch.int64).reshape(-1, 2)
    real = torch.tensor([c[2:] for c in cut], dtype=torch.float32).reshape(-1, 2)
    return Truncation(*whole.T, *real.T)


@given(filters=SOME, columns=st.sampled_from([4, 40]), seed=st.integers(0, 10**6))
def test_the_trainer_computes_what_a_shard_of_the_sampler_does(filters, columns, seed, device) -> None:  # type: ignore[no-untyped-def]
    scene = Scene(filters, columns, seed, device)
    out = scene.logprob(cut=scene.truncation)
    assert out.isfinite().all()
    picked = scene.cut.gather(1, scene.targets[:, None])[:, 0]
    for size in (1, 2, 4, 8):
        shards = scene.cut.chunk(size, 1)
        nodes = torch.cat([vocab_nodes(s.contiguous(), scene.temperature, LEAVES // size) for s in shards], 1)
        assert_same_bits(out, vocab_logprob(nodes, picked, scene.temperature)[0], f"{size} shards")
    for i in range(0, ROWS, 5):
        alone = scene.truncation.take(i, i + 1)
        assert_same_bits(scene.logprob([i], alone), out[i : i + 1], f"row {i} alone")
    plain = [i for i, f in enumerate(filters) if f is None]
    assert_same_bits(out[plain], scene.logprob()[plain], "rows that are not cut")


@given(filters=SOME, columns=st.sampled_from([4, 40]), seed=st.integers(0, 10**6))
def test_gradient(filters, columns, seed, device) -> None:  # type: ignore[no-untyped-def]
    """Against autograd in float64: the log-softmax over the tokens that are kept, which is a constant set."""
    scene = Scene(filters, columns, seed, device)
    ours = scene.gradients(scene.truncation)
    x, head = scene.x.double().requires_grad_(), scene.head.double().requires_grad_()
    z = (x @ head.T / scene.temperature.double()[:, None]).masked_fill(scene.cut == -torch.inf, -torch.inf)
    out = z.log_softmax(1).gather(1, scene.targets[:, None])[:, 0]
    weights = torch.linspace(-1, 2, ROWS, device=device, dtype=torch.float64)
    exact = (out.detach(), *torch.autograd.grad(out, (x, head), weights))
    bound = 2e-2 if device.type == "cuda" else 2e-5  # of bfloat16, of float32
    for name, a, e in zip(("log-probs", "x", "head"), ours, exact, strict=True):
        limit = (1e-5 if name == "log-probs" else bound) * (1 + e.abs().max())
        assert (a.double() - e).abs().max() <= limit, name


@given(columns=st.sampled_from([4, 40]), seed=st.integers(0, 10**6), count=st.sampled_from([1, ROWS]))
def test_filters_that_keep_everything_change_no_bit(columns, seed, count, device) -> None:  # type: ignore[no-untyped-def]
    filters: list[Filter | None] = [(10**6, 1.0, 0.0) if i < count else None for i in range(ROWS)]
    scene = Scene(filters, columns, seed, device)
    assert_same_bits(scene.gradients(scene.truncation), scene.gradients(None))


def test_a_token_that_is_not_kept_has_no_probability(device) -> None:  # type: ignore[no-untyped-def]
    scene = Scene([(3, 1.0, 0.0)] * ROWS, 4, 0, device)
    scene.targets = scene.logits.argmin(1)
    assert (scene.logprob(cut=scene.truncation) == -torch.inf).all()


@given(filter=FILTERS, temperature=st.sampled_from([0.5, 1.0, 1.7]), seed=st.integers(0, 2**40))
def test_draws_follow_the_distribution(filter, temperature, seed, device) -> None:  # type: ignore[no-untyped-def]
    """Pearson's chi-square of 20,000 draws against the float64 softmax over what is kept; nothing else is ever drawn."""
    draws, vocab = 20000, 48
    logits = 2 * torch.randn(1, vocab, generator=torch.Generator().manual_seed(seed % 997)).to(device)
    heat = torch.full((1,), temperature, device=device)
    truncate(logits, heat, truncation([filter]).to(device))
    seeds = torch.arange(seed, seed + draws, device=device)
    positions, greedy = torch.full_like(seeds, 17), torch.zeros(draws, dtype=torch.uint8, device=device)
    _, tokens, _ = gumbel_argmax(logits.expand(draws, -1).contiguous(), heat.repeat(draws), seeds, positions, greedy)
    p = (logits[0].double() / temperature).softmax(0).cpu()
    found = torch.bincount(tokens.cpu(), minlength=vocab).double()
    assert not found[p == 0].any()
    likely = (p * draws) >= 5
    rest = [(found[~likely].sum(), p[~likely].sum() * draws)] if p[~likely].sum() * draws >= 5 else []
    pairs = [*zip(found[likely], p[likely] * draws, strict=True), *rest]
    chi, freedom = sum(float((o - e) ** 2 / e) for o, e in pairs), len(pairs) - 1
    assert chi <= freedom + 5 * (2 * freedom) ** 0.5 + 10, f"chi-square {chi:.1f} of {freedom} degrees of freedom"


def test_a_logit_that_is_no_number_has_no_weight() -> None:
    weight = weights(torch.tensor([[torch.nan, 1.0, -torch.inf, 1.0]]), torch.ones(1))
    assert weight.tolist() == [[0, 1 << 40, 0, 1 << 40]]


def test_take_and_parts() -> None:
    whole = truncation([(1, 0.5, 0.0), None, (3, 1.0, 0.25)] * 100)
    parts = list(whole.parts())
    assert all(0 < len(p) <= AT_ONCE for p in parts) and len(parts) > 1
    for name, values in vars(whole).items():
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), values), name
    middle = whole.take(2, 6)
    assert middle.rows.tolist() == [0, 1, 3] and middle.top_k.tolist() == [3, 1, 3]
    assert not len(Truncation.none()) and list(Truncation.none().parts()) == []
