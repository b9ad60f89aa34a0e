"""Baselines of the evaluation of unseen tasks: what a generator must beat."""

from training.baselines.base import Baseline, TrainingTasks
from training.baselines.registry import BASELINES, build_baseline

__all__ = ["BASELINES", "Baseline", "TrainingTasks", "build_baseline"]
