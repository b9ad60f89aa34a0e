"""The objective against torch.distributions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from tests.fixtures.kernel import PROPERTY, normal
from training.objective import evaluate_objective


@PROPERTY
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32), st.sampled_from([0.1, 1, 3]))
def test_kl_is_that_of_torch_distributions(
    batch: int, latent: int, seed: int, spread: float
) -> None:
    mean = normal(batch, latent, seed=seed, std=spread)
    log_variance = normal(batch, latent, seed=seed + 1, std=spread)
    posterior = Normal(mean, torch.exp(0.5 * log_variance))

    objective = evaluate_objective(mean, mean, mean, log_variance)

    expected = kl_divergence(posterior, Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(objective.kl, expected, rtol=1e-4, atol=1e-6)


@PROPERTY
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32))
def test_reconstruction_is_twice_the_gaussian_nll_without_its_constant(
    batch: int, num_params: int, seed: int
) -> None:
    decoded = normal(batch, num_params, seed=seed)
    adapters = normal(batch, num_params, seed=seed + 1)
    nll = -Normal(decoded, 1.0).log_prob(adapters).mean()

    objective = evaluate_objective(decoded, adapters, torch.zeros(batch, 1), torch.zeros(batch, 1))

    expected = 2 * (nll - 0.5 * math.log(2 * math.pi))
    torch.testing.assert_close(objective.reconstruction, expected, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_torch_distributions() -> None:
    mean, log_variance = normal(3, 4).requires_grad_(), normal(3, 4, seed=1).requires_grad_()
    evaluate_objective(mean, mean.detach(), mean, log_variance, kl_weight=1.0).kl.backward()
    ours = (mean.grad.clone(), log_variance.grad.clone())
    mean.grad = log_variance.grad = None

    kl_divergence(Normal(mean, torch.exp(0.5 * log_variance)), Normal(0.0, 1.0)).mean().backward()

    torch.testing.assert_close(ours, (mean.grad, log_variance.grad))


def test_kl_is_zero_at_the_prior_and_positive_elsewhere() -> None:
    at_prior = evaluate_objective(
        torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 4), torch.zeros(3, 4)
    )

    assert at_prior.kl == 0
    for mean, log_variance in ((0.1, 0.0), (0.0, 0.1), (0.0, -0.1)):
        elsewhere = evaluate_objective(
            torch.zeros(3, 2),
            torch.zeros(3, 2),
            torch.full((3, 4), mean),
            torch.full((3, 4), log_variance),
        )
        assert elsewhere.kl > 0


@pytest.mark.parametrize("weight", [0.0, 0.005, 1.0])
def test_loss_is_the_weighted_sum(weight: float) -> None:
    parts = evaluate_objective(
        normal(2, 6), normal(2, 6, seed=1), normal(2, 3), normal(2, 3, seed=1), weight
    )

    torch.testing.assert_close(parts.loss, parts.reconstruction + weight * parts.kl)


def test_the_papers_weight_is_the_default() -> None:
    arguments = (normal(2, 6), normal(2, 6, seed=1), normal(2, 3), normal(2, 3, seed=1))

    assert evaluate_objective(*arguments) == evaluate_objective(*arguments, kl_weight=0.005)


def test_parts_do_not_grow_with_the_adapter_or_the_batch() -> None:
    for batch, num_params in ((1, 4), (7, 4), (1, 400)):
        parts = evaluate_objective(
            torch.full((batch, num_params), 3.0),
            torch.full((batch, num_params), 1.0),
            torch.ones(batch, 5),
            torch.zeros(batch, 5),
        )
        assert (parts.reconstruction.item(), parts.kl.item()) == (4.0, 0.5)
