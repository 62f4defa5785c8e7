"""Sampling against exact probabilities and against a plain-Python reference; a grid of uniforms leaves no chance."""

import math
from fractions import Fraction

import pytest
import torch

from llama_mp import sampling
from llama_mp.config import SamplingConfig
from llama_mp.errors import RunError
from llama_mp.sampling import Row, check_finite, sample, token_logprobs, uniform

GREEDY = SamplingConfig(temperature=0)
PLAIN = {"temperature": 1.0, "top_p": 1.0}


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def mask_of(seen: list[int], logits_BV: torch.Tensor) -> torch.Tensor:
    """Every row has seen the same."""
    return torch.isin(torch.arange(logits_BV.shape[1]), torch.tensor(seen, dtype=torch.long)).expand_as(logits_BV)


def draw(logits_V: torch.Tensor, u: float, seen: list[int] | None = None, **flags: float) -> int:
    config = SamplingConfig(**{**PLAIN, **flags})
    tokens, logprobs = sample(logits_V[None], [Row(sampling=config, uniform=u)], mask_of(seen or [], logits_V[None]))
    assert logprobs is None
    return tokens.item()


def frequencies(logits_V: torch.Tensor, num: int = 2000, **flags: float) -> list[float]:
    """How often each token comes over an even grid of uniforms: within 1/num of its probability."""
    row_config = SamplingConfig(**{**PLAIN, **flags})
    rows = [Row(sampling=row_config, uniform=(i + 0.5) / num) for i in range(num)]
    tokens, _ = sample(logits_V.expand(num, -1), rows)
    return (torch.bincount(tokens, minlength=len(logits_V)) / num).tolist()


def kept_by_reference(values: list[float], config: SamplingConfig) -> dict[int, float]:
    """Probabilities after the filters, written as the docstring reads, in float64."""
    best = max(values)
    weights = {i: math.exp((v - best) / config.temperature) for i, v in enumerate(values)}
    order = sorted(weights, key=lambda i: (-weights[i], i))
    order = order[: config.top_k or None]
    total = sum(weights[i] for i in order)
    kept, cumulative = [], 0.0
    for i in order:
        if cumulative >= config.top_p * total:
            break
        cumulative += weights[i]
        kept.append(i)
    kept = [i for i in kept if weights[i] >= config.min_p * weights[order[0]]]
    total = sum(weights[i] for i in kept)
    return {i: weights[i] / total for i in kept}


def token_by_reference(probabilities: dict[int, float], u: float) -> int:
    cumulative = 0.0
    for token, probability in probabilities.items():
        cumulative += probability
        if u < cumulative:
            return token
    return token


FILTERS = [
    {},
    {"temperature": 0.6},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 5.0, "top_k": 30, "top_p": 0.95, "min_p": 0.4},
]


@pytest.mark.parametrize("flags", FILTERS, ids=str)
def test_frequencies_are_the_exact_probabilities(flags):
    logits_V = logits(50, seed=1)
    expected = kept_by_reference(logits_V.tolist(), SamplingConfig(**{**PLAIN, **flags}))
    found = frequencies(logits_V, **flags)
    assert {i for i, f in enumerate(found) if f} <= set(expected)
    assert found == pytest.approx([expected.get(i, 0.0) for i in range(50)], abs=1.01 / 2000)


@pytest.mark.parametrize("flags", FILTERS, ids=str)
@pytest.mark.parametrize("few", [4, 1024])
def test_each_filter_draws_the_reference_token(flags, few, monkeypatch):
    monkeypatch.setattr(sampling, "FEW", few)  # 4: the first candidates do not hold the whole set
    for seed in range(20):
        logits_V = logits(300, seed=seed)
        u = uniform(seed, "reference", 0)
        config = SamplingConfig(**{**PLAIN, **flags})
        assert draw(logits_V, u, **flags) == token_by_reference(kept_by_reference(logits_V.tolist(), config), u)


def test_few_candidates_and_all_give_the_same_tokens(monkeypatch):
    rows = [Row(sampling=SamplingConfig(temperature=3, top_p=p), uniform=p) for p in (0.1, 0.5, 0.9, 1.0)]
    logits_BV = logits(4, 5000, scale=1.0)
    by_default, _ = sample(logits_BV, rows)
    monkeypatch.setattr(sampling, "FEW", 5000)
    assert by_default.equal(sample(logits_BV, rows)[0])


def test_rows_do_not_depend_on_each_other():
    configs = [SamplingConfig(**{**PLAIN, **flags}) for flags in FILTERS]
    configs += [GREEDY, SamplingConfig(temperature=0, repetition_penalty=1.5), SamplingConfig(logprobs=True)]
    logits_BV = logits(len(configs), 3000)
    seen_BV = mask_of([3, 9, 9], logits_BV)
    rows = [Row(sampling=c, uniform=uniform(1, str(i), 5)) for i, c in enumerate(configs)]
    together, logprobs = sample(logits_BV, rows, seen_BV)
    for i, row in enumerate(rows):
        alone, alone_logprobs = sample(logits_BV[i : i + 1], [row], seen_BV[:1])
        assert alone.item() == together[i]
        assert (alone_logprobs is not None) == row.sampling.logprobs
        if alone_logprobs is not None:
            assert alone_logprobs.item() == logprobs[i]
    order = list(reversed(range(len(rows))))
    assert sample(logits_BV[order], [rows[i] for i in order], seen_BV)[0].equal(together.flip(0))


def test_greedy_takes_the_lowest_id_of_equals_and_sorts_nothing(monkeypatch):
    monkeypatch.delattr(sampling, "_draw")
    logits_BV = torch.tensor([[1.0, 5.0, 5.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
    assert sample(logits_BV, [Row(sampling=GREEDY)] * 2)[0].tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type(dtype):
    logits_BV = logits(2, 40).to(dtype)
    rows = [Row(sampling=GREEDY), Row(sampling=SamplingConfig(logprobs=True), uniform=0.7)]
    tokens, logprobs = sample(logits_BV, rows)
    assert tokens.equal(sample(logits_BV.float(), rows)[0])
    assert tokens.dtype == torch.int64 and logprobs.dtype == torch.float32


def test_penalty_divides_positive_and_multiplies_negative_logits():
    logits_BV = torch.tensor([[2.0, 3.0, -1.0, -1.5]])
    kept = logits_BV.clone()
    rows = [Row(sampling=SamplingConfig(temperature=0, repetition_penalty=2))]
    assert sample(logits_BV, rows, mask_of([1], logits_BV)).tokens.item() == 0
    assert logits_BV.equal(kept)
    # token 1 stands at 1.5: between 2 and -2
    assert sample(logits_BV, rows, mask_of([1, 0, 2], logits_BV)).tokens.item() == 1
    expected = kept_by_reference([2.0, 1.5, -2.0, -1.5], SamplingConfig(**PLAIN))
    for i in range(40):
        u = (i + 0.5) / 40
        assert draw(logits_BV[0], u, seen=[1, 2], repetition_penalty=2) == token_by_reference(expected, u)


def test_penalty_of_some_rows_and_of_nothing_seen():
    logits_BV = logits(2, 9, scale=1.0).abs()
    config = SamplingConfig(temperature=0, repetition_penalty=100)
    everything = torch.ones_like(logits_BV, dtype=torch.bool)
    alike = [Row(sampling=GREEDY), Row(sampling=config)]
    best = logits_BV.argmax(-1).tolist()
    assert sample(logits_BV, alike, ~everything).tokens.tolist() == best
    everything[0] = everything[1, 0] = False
    assert sample(logits_BV, alike, everything).tokens.tolist() == [best[0], 0]


def test_logprobs_are_of_the_raw_distribution():
    logits_BV = logits(2, 30)
    flags = {"temperature": 0.3, "top_k": 2, "repetition_penalty": 3.0, "logprobs": True}
    rows = [Row(sampling=SamplingConfig(**flags), uniform=0.5), Row(sampling=GREEDY)]
    tokens, logprobs = sample(logits_BV, rows, mask_of([4], logits_BV))
    assert logprobs.equal(logits_BV.log_softmax(-1)[torch.arange(2), tokens])


@pytest.mark.parametrize("u", [0.0, 0.29, 1 - 2**-53])
class TestEdges:
    def test_one_token_possible(self, u):
        logits_V = torch.full((20,), -torch.inf)
        logits_V[13] = -4.0
        assert draw(logits_V, u) == draw(logits_V, u, top_p=0.5, min_p=0.5, top_k=5) == 13

    def test_equal_logits_in_the_order_of_ids(self, u):
        expected = math.floor(Fraction(u) * 10)
        assert draw(torch.zeros(10), u) == expected
        assert draw(torch.zeros(10), u, top_k=4) == math.floor(Fraction(u) * 4)
        assert draw(torch.zeros(10), u, top_p=0.3) == math.floor(Fraction(u) * 3)

    def test_tiny_top_p_keeps_the_best(self, u):
        assert draw(logits(100), u, top_p=1e-300) == logits(100).argmax()

    def test_tiny_temperature_is_greedy(self, u):
        assert draw(logits(100), u, temperature=1e-300) == logits(100).argmax()

    def test_top_k_above_the_vocabulary_is_all(self, u):
        assert draw(logits(100), u, top_k=10**30) == draw(logits(100), u)

    def test_huge_logits(self, u):
        logits_V = torch.tensor([3e38, -3e38, 2.9e38])
        assert draw(logits_V, u) == 0

    def test_one_token_vocabulary(self, u):
        assert draw(torch.zeros(1), u) == 0

    def test_llama_3_vocabulary(self, u):
        expected = min(math.floor(Fraction(u) * 128256), 128255)
        assert draw(torch.zeros(128256), u) == expected


@pytest.mark.parametrize("config", [GREEDY, SamplingConfig(), SamplingConfig(top_k=3)])
@pytest.mark.parametrize("bad", [[math.nan], [math.inf], [-math.inf] * 3000, [math.nan, math.inf]])
def test_logits_that_are_not_finite(config, bad):
    logits_BV = logits(2, 3000)
    logits_BV[1, : len(bad)] = torch.tensor(bad)
    tokens = sample(logits_BV, [Row(sampling=config, uniform=0.999)] * 2).tokens.tolist()
    assert tokens[0] >= 0 > tokens[1]
    check_finite(tokens[:1])
    with pytest.raises(RunError, match=r"not finite.* --dtype fp32 or bf16"):
        check_finite(tokens)


def test_uniform_hangs_on_all_three_and_is_fixed():
    assert uniform(1, "0", 0) == uniform(1, "0", 0)
    near = [uniform(1, "0", 0), uniform(2, "0", 0), uniform(1, "1", 0), uniform(1, "0", 1), uniform(1, "0,0", 0)]
    near += [uniform(1, "2,0", 1), uniform(1, "0", 12), uniform(11, "0", 2), uniform(-1, "0", 0)]
    near += [uniform(10**30, "", 0)]
    assert len(set(near)) == len(near)
    assert all(0 <= u < 1 for u in near)
    assert uniform(1, "0", 0) == 0.2674682071942174  # a change of this number changes every user's texts


def test_uniform_is_uniform():
    values = sorted(uniform(1, f"prompt {i // 50}", i % 50) for i in range(5000))
    largest_gap = max(abs(v - i / 5000) for i, v in enumerate(values))
    assert largest_gap < 1.63 / math.sqrt(5000)  # Kolmogorov-Smirnov at 1 %; the values are fixed, so it never flakes


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 31 * 3, 2**20])
def test_token_logprobs(chunk_bytes, monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK_BYTES", chunk_bytes)
    logits_TV, ids_T = logits(8, 31).bfloat16(), torch.arange(8)
    expected = logits_TV.float().log_softmax(-1)[torch.arange(8), ids_T]
    assert token_logprobs(logits_TV, ids_T).equal(expected)


def test_token_logprobs_of_no_position():
    assert token_logprobs(torch.zeros(0, 31), torch.zeros(0, dtype=torch.long)).shape == (0,)
