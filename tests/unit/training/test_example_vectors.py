"""Example vectors are fitted to training documents alone; every sample is left out in turn."""

import math

import pytest
import torch
from torch.nn import functional

from service.errors import InvalidTaskDataError
from service.inference.base_model import BaseModel, load_base_model
from service.synthesis.novelty import draw_nonsense
from service.synthesis.task_encoder import HiddenStateEncoder
from tests.fixtures.kernel import normal
from training.example_vectors import (
    TEMPERATURES,
    choose_temperature,
    encode_examples,
    measure_left_out,
)
from training.tasks.text import TextTask


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_base_model(
        "embedded:tiny-random",
        device="cpu",
        dtype="float32",
        cache_dir=tmp_path_factory.mktemp("base"),
    )


def draw_samples(spread: float, tasks: int = 4, samples: int = 5) -> list[torch.Tensor]:
    """States around a center each, with a large common part."""
    return [
        normal(8, seed=task) + normal(samples, 8, seed=10 + task, std=spread) + 20
        for task in range(tasks)
    ]


def measure_scale(samples: list[torch.Tensor]) -> torch.Tensor:
    """Root of the mean square distance to the own task's mean, per dimension; equal counts."""
    return torch.cat([rows - rows.mean(0) for rows in samples]).square().mean(0).sqrt()


def make_task(name: str, *documents: str) -> TextTask:
    return TextTask(name, name.title(), (name,), (f"unseen {name}",), documents, ("held out",))


def test_temperature_is_that_at_which_left_out_samples_are_named_best() -> None:
    samples = draw_samples(spread=1.0)
    scale = measure_scale(samples)

    def measure_loss(temperature: float) -> float:
        total = 0.0
        for owner, rows in enumerate(samples):
            for number, row in enumerate(rows):
                kept = [
                    torch.stack([r for i, r in enumerate(other) if (task, i) != (owner, number)])
                    for task, other in enumerate(samples)
                ]
                vectors = torch.stack([each.mean(0) for each in kept])
                center = vectors.mean(0)
                cosine = functional.cosine_similarity(
                    (vectors - center) / scale, (row - center) / scale
                )
                total -= float((cosine / temperature).log_softmax(dim=0)[owner])
        return total

    chosen = choose_temperature(samples)

    losses = {each: measure_loss(each) for each in TEMPERATURES}
    assert losses[chosen] == pytest.approx(min(losses.values()), rel=1e-6)
    assert TEMPERATURES[0] < chosen < TEMPERATURES[-1]


def test_the_surer_samples_are_of_their_tasks_the_sharper_the_weights() -> None:
    near, far = (choose_temperature(draw_samples(spread)) for spread in (0.2, 3.0))
    assert near < far


def test_left_out_evidence_never_sees_the_own_task() -> None:
    samples, nonsense = draw_samples(spread=0.1, tasks=3, samples=2), normal(2, 8, seed=99) + 20
    expected = []
    for owner, rows in enumerate(samples):
        others = [each.mean(0) for task, each in enumerate(samples) if task != owner]
        center = torch.stack(others).mean(0)
        scale = measure_scale([each for task, each in enumerate(samples) if task != owner])
        for row in rows:
            nearest, nonsensical = (
                max(
                    float(
                        functional.cosine_similarity(
                            (row - center) / scale, (each - center) / scale, dim=0
                        )
                    )
                    for each in group
                )
                for group in (others, nonsense)
            )
            expected.append(nearest - nonsensical)

    measured = measure_left_out(samples, nonsense)

    torch.testing.assert_close(measured, torch.tensor(sorted(expected)))
    assert len(measure_left_out(samples[:1], nonsense)) == 0


def test_vectors_are_equation_one_of_documents_spread_over_the_task(base: BaseModel) -> None:
    documents = [f"{number} is a number" for number in range(10)]
    tasks = [make_task("numbers", *documents), make_task("letters", "a b c", "  x y z\n", "x y z")]
    encoder = HiddenStateEncoder(base.model, base.tokenizer, base.digest)

    known = encode_examples(base, tasks, num_samples=5)

    assert known.encoder_id == f"hidden_states/{base.digest}/256"
    expected = [encoder.read_states(documents[::2]), encoder.read_states(["a b c", "x y z"])]
    torch.testing.assert_close(known.vectors, torch.stack([each.mean(0) for each in expected]))
    torch.testing.assert_close(known.nonsense, encoder.read_states(draw_nonsense()))
    assert len(known.left_out) == 7
    assert math.isfinite(known.temperature)


def test_a_task_of_one_document_has_none_to_leave_out(base: BaseModel) -> None:
    with pytest.raises(InvalidTaskDataError, match="'alone' has one training document"):
        encode_examples(base, [make_task("alone", "same", "same ")], num_samples=4)
