"""Sampling against transformers' top-p filter and against the distribution itself."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TopPLogitsWarper

from service.inference.sampling import find_best_tokens, sample_token, select_nucleus
from tests.fixtures.kernel import PROPERTY, normal


def draw(
    logits: torch.Tensor, count: int, *, temperature: float = 1.0, top_p: float = 1.0
) -> list[int]:
    generator = torch.Generator().manual_seed(7)
    return [sample_token(logits, temperature, top_p, generator) for _ in range(count)]


@PROPERTY
@given(
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([1, 5, 300, 3_000]),
    spread=st.sampled_from([0.01, 1.0, 8.0]),
    top_p=st.floats(0.01, 0.999),
)
def test_nucleus_is_that_of_transformers(
    seed: int, vocab: int, spread: float, top_p: float
) -> None:
    logits = normal(vocab, seed=seed, std=spread).double()  # sums far from rounding's reach
    kept = TopPLogitsWarper(top_p)(torch.zeros(1, 1), logits[None])[0].isfinite()

    probabilities, tokens = select_nucleus(logits.softmax(-1), top_p)

    assert set(tokens.tolist()) == set(kept.nonzero().flatten().tolist())
    assert torch.equal(probabilities, logits.softmax(-1)[tokens])


def test_frequencies_are_those_of_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    counts = torch.tensor(draw(logits, 4_000, temperature=0.8)).bincount(minlength=4)
    expected = 4_000 * (logits / 0.8).softmax(-1)

    chi_square = ((counts - expected).square() / expected).sum()
    assert chi_square < 16.3  # 0.1% of right samplers exceed it (3 degrees of freedom)


def test_only_the_nucleus_is_drawn_in_proportion() -> None:
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    counts = torch.tensor(draw(logits, 4_000, top_p=0.7)).bincount(minlength=4)

    assert counts[0] == counts[2] == 0  # 0.5 + 0.25 is enough
    assert counts[1] / 4_000 == pytest.approx(2 / 3, abs=0.03)


def test_a_narrow_nucleus_and_a_low_temperature_are_greedy() -> None:
    logits = normal(1_000)
    greedy = int(logits.argmax())

    for top_p in (1e-6, 5e-324):
        assert set(draw(logits, 20, top_p=top_p)) == {greedy}
    for temperature in (1e-30, 1e-40, 5e-324):  # the last two are not normal in float32
        assert set(draw(logits, 20, temperature=temperature)) == {greedy}


def test_same_seed_same_tokens() -> None:
    logits = normal(1_000)
    assert draw(logits, 20) == draw(logits, 20)
    assert len(set(draw(logits, 20))) > 10


def test_tiny_changes_of_the_logits_hardly_ever_change_a_draw() -> None:
    logits = normal(1_000)
    pairs = zip(draw(logits, 200), draw(logits + normal(1_000, seed=1, std=1e-6), 200), strict=True)
    assert sum(a != b for a, b in pairs) <= 1


def test_bfloat16_logits_are_fine() -> None:
    assert draw(normal(100).bfloat16(), 5, top_p=0.9)


@pytest.mark.parametrize("vocab", [1, 7, 96, 512, 49_152])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_best_tokens_are_those_of_max(vocab: int, dtype: torch.dtype) -> None:
    logits = normal(5, vocab).to(dtype)
    score, token = find_best_tokens(logits)
    assert torch.equal(score, logits.amax(1))
    assert token.tolist() == [row.index(max(row)) for row in logits.tolist()]  # first of equal ones
    logits[2, vocab // 2] = torch.nan
    score, _ = find_best_tokens(logits)
    assert score.isnan().tolist() == [False, False, True, False, False]
