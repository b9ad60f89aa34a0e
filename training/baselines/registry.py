"""Baselines by name."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from service.errors import InvalidInputError
from training.baselines.base import Baseline
from training.baselines.cond_p_diff import CondPDiff
from training.baselines.conditional_vae import ConditionalVaeBaseline
from training.baselines.gaussian import Gaussian
from training.baselines.greedy_soup import GreedySoup
from training.baselines.hypernet import HyperNet
from training.baselines.multi_task import MultiTask
from training.baselines.nearest import Nearest
from training.baselines.own_checkpoints_mean import OwnCheckpointsMean
from training.baselines.pca_ridge import PcaRidge
from training.baselines.soup import Soup
from training.baselines.top_k import TopK

PRESETS = ("paper", "token", "in_context")
"""Generators of this project, by their presets."""

BASELINES: Mapping[str, Callable[..., Baseline]] = MappingProxyType(
    {
        Soup.name: Soup,
        GreedySoup.name: GreedySoup,
        MultiTask.name: MultiTask,
        Nearest.name: Nearest,
        TopK.name: TopK,
        Gaussian.name: Gaussian,
        PcaRidge.name: PcaRidge,
        HyperNet.name: HyperNet,
        CondPDiff.name: CondPDiff,
        **{preset: partial(ConditionalVaeBaseline, preset) for preset in PRESETS},
        OwnCheckpointsMean.name: OwnCheckpointsMean,
    }
)
"""What builds each one; its keyword arguments are the attributes of its class."""


def build_baseline(name: str, **options: Any) -> Baseline:
    """An unfitted baseline.

    Raises:
        InvalidInputError: an unknown name (the message lists the known ones), or options that
            the baseline does not take or lacks.
    """
    if name not in BASELINES:
        raise InvalidInputError(f"unknown baseline {name!r}; known: {', '.join(BASELINES)}")
    build = BASELINES[name]
    try:
        inspect.signature(build).bind(**options)
    except TypeError as error:
        raise InvalidInputError(f"baseline {name!r}: {error}") from error
    return build(**options)
