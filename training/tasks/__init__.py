"""Tasks: the descriptions, training data and held-out data that adapters are made from."""

from training.tasks.text import TextTask, load_text_tasks

__all__ = ["TextTask", "load_text_tasks"]
