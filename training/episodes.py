"""Leave-one-task-out episodes: what the decoder of preset `in_context` may not look at."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from service.errors import InvalidInputError
from training.recipe import ContextSection


class Episodes:
    """Draws the training tasks that are hidden from the decoder of each example.

    In a share of the examples the task that is to be decoded is hidden with its whole family, so
    that it is an unseen one. Of the other tasks each may be hidden too, so that the decoder does
    not know a task by the company that it keeps; if that would leave nothing, none of them is.

    Args:
        families: of the tasks, in order.
        section: shares.

    Raises:
        InvalidInputError: all tasks are of one family.
    """

    def __init__(self, families: Sequence[str], section: ContextSection) -> None:
        names = sorted(set(families))
        if len(names) < 2:
            raise InvalidInputError(
                "episodes hide a task's family, and there is only one: give tasks of two families"
            )
        numbers = torch.tensor([names.index(family) for family in families])
        self._is_family = numbers[:, None] == numbers  # [tasks, tasks]
        self._section = section

    def hide_families(self, tasks: Int[Tensor, " batch"]) -> Bool[Tensor, "batch tasks"]:
        """What makes each of these tasks an unseen one: its family."""
        return self._is_family[tasks]

    def hide(
        self, tasks: Int[Tensor, " batch"], generator: torch.Generator
    ) -> Bool[Tensor, "batch tasks"]:
        """What is hidden from the decoder of each of these tasks' examples."""
        is_family = self.hide_families(tasks)
        is_episode = torch.rand(len(tasks), 1, generator=generator) < self._section.episode_share
        family = is_family & is_episode
        drawn = torch.rand(is_family.shape, generator=generator) < self._section.dropout
        hidden = family | (drawn & ~is_family)
        return torch.where(hidden.all(1, keepdim=True), family, hidden)
