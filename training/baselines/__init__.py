"""Baselines of the evaluation of unseen tasks: what a generator must beat."""

from training.baselines.base import Baseline, TrainingTasks
from training.baselines.registry import BASELINES, PRESETS, build_baseline

__all__ = ["BASELINES", "PRESETS", "Baseline", "TrainingTasks", "build_baseline"]
