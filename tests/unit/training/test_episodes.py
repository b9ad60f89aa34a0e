"""Episodes hide whole families, in the share of examples that the recipe states."""

import pytest
import torch

from service.errors import InvalidInputError
from training.episodes import Episodes
from training.recipe import ContextSection

FAMILIES = ("a", "b", "a", "c")


def draw(tasks: torch.Tensor, seed: int = 0, **section: float) -> torch.Tensor:
    episodes = Episodes(FAMILIES, ContextSection(num_neighbours=2, **section))  # type: ignore[arg-type]
    return episodes.hide(tasks, torch.Generator().manual_seed(seed))


def test_an_episode_hides_the_task_with_its_family() -> None:
    hidden = draw(torch.tensor([0, 1, 2, 3]), episode_share=1.0)
    a, b, c = [True, False, True, False], [False, True, False, False], [False, False, False, True]
    assert hidden.tolist() == [a, b, a, c]
    assert not draw(torch.arange(4), episode_share=0.0).any()


def test_shares_are_those_of_the_recipe() -> None:
    tasks = torch.ones(20_000, dtype=torch.long)
    hidden = draw(tasks, episode_share=0.3, dropout=0.2).double().mean(0)
    assert hidden[1] == pytest.approx(0.3, abs=0.02)
    assert hidden[[0, 2, 3]].tolist() == pytest.approx([0.2] * 3, abs=0.02)


def test_something_is_always_left_to_look_at() -> None:
    tasks = torch.arange(4).repeat(500)
    assert not draw(tasks, episode_share=1.0, dropout=0.99).all(1).any()


def test_one_family_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="two families"):
        Episodes(["a", "a"], ContextSection(num_neighbours=1, episode_share=1.0))
