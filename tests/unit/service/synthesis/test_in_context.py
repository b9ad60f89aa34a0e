"""The preset `in_context`: at gate 0 it is retrieval, and what is hidden has no influence."""

import pytest
import torch
from torch import Tensor

from service.synthesis.generator_config import GeneratorConfig
from service.synthesis.in_context import InContextDecoder
from tests.fixtures.kernel import normal
from tests.fixtures.tiny_training import TINY_LAYOUT, draw_checkpoints, draw_task_vectors
from training.baselines.base import TrainingTasks
from training.baselines.top_k import mix_top_k

TASKS = 5


def make_decoder(*, gate: float, num_neighbours: int = 3) -> InContextDecoder:
    config = GeneratorConfig(
        "in_context",
        condition_dim=12,
        latent_dim=4,
        depth=2,
        width=16,
        chunk_size=16,
        num_prototypes=TASKS,
        attention_temperature=0.1,
        num_neighbours=num_neighbours,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = InContextDecoder(TINY_LAYOUT, config)
    decoder.gate.data.fill_(gate)
    tasks = make_tasks()
    decoder.set_keys(tasks.keys.float())
    decoder.set_adapters(tasks.own_adapters.float())
    return decoder.eval().requires_grad_(False)


def make_tasks() -> TrainingTasks:
    vectors = draw_task_vectors(TASKS)
    names = [f"task{task}" for task in range(TASKS)]
    return TrainingTasks.from_stages(
        TINY_LAYOUT, draw_checkpoints(TASKS), vectors, dict(zip(names, names, strict=True))
    )


def hide(*tasks: int) -> Tensor:
    hidden = torch.zeros(1, TASKS, dtype=torch.bool)
    hidden[0, list(tasks)] = True
    return hidden


@pytest.mark.parametrize("num_neighbours", [1, 3, 9])
def test_at_gate_0_it_is_the_weighted_mean_of_the_nearest_adapters(num_neighbours: int) -> None:
    conditions = normal(4, 12, seed=9)
    decoded = make_decoder(gate=0.0, num_neighbours=num_neighbours)(normal(4, 4), conditions)
    mixed = mix_top_k(make_tasks(), conditions, num_neighbours, [0.1])[0]
    torch.testing.assert_close(decoded.double(), mixed, atol=1e-5, rtol=1e-5)


def test_a_hidden_task_has_no_influence() -> None:
    decoder, (key, z) = make_decoder(gate=1.0), (make_tasks().keys[1:2].float(), normal(1, 4))
    seen, unseen = decoder(z, key), decoder(z, key, hide(1))
    assert not torch.allclose(seen, unseen)

    decoder.adapters[1] = 100.0
    decoder.keys[1] = -decoder.keys[1]

    assert torch.equal(decoder(z, key, hide(1)), unseen)
    assert decoder.weigh_tasks(key, hide(0, 1, 2, 3))[0].tolist() == [0, 0, 0, 0, 1]


def test_the_code_matters_as_soon_as_the_gate_is_open() -> None:
    key = make_tasks().keys[:1].float()
    closed, half = make_decoder(gate=0.0), make_decoder(gate=0.5)
    assert torch.equal(closed(normal(1, 4), key), closed(normal(1, 4, seed=1), key))
    assert not torch.allclose(half(normal(1, 4), key), half(normal(1, 4, seed=1), key))
