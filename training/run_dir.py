"""A run's folder: recipe, finished stages, resumable state, metrics."""

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import InvalidRecipeError
from training.checkpoint import write_text
from training.recipe import Recipe


@dataclass(frozen=True)
class RunDir:
    """Paths of a run.

        recipe.json                      the recipe, pinned by the first stage
        base/                            the base, where the run trains it
        bases.safetensors                frozen bases of the adapters
        adapters/TASK.SEED.safetensors   late checkpoints of one fine-tuning
        task_vectors.safetensors         encoded wordings
        generator.safetensors            trained conditional VAE
        generator.SEED.safetensors       further ones, to compare with
        functional.SEED.safetensors      each, trained through the base
        seed_adapters.safetensors        what these generate
        own_adapters.safetensors         mean late checkpoint of each task, for evaluation
        bundle/                          what serving loads
        state/                           resumable state of whatever is unfinished
        metrics.jsonl                    one line per reported step

    Every file but the last is whole or absent.
    """

    root: Path
    recipe: Recipe

    @classmethod
    def open(cls, root: Path, recipe: Recipe) -> "RunDir":
        """Creates the folder, or re-opens it for the same recipe.

        Raises:
            InvalidRecipeError: the folder holds adapters of another base, task set or layout, or
                a generator of another recipe.
        """
        run = cls(root, recipe)
        pinned = root / "recipe.json"
        if pinned.exists():
            before = Recipe.model_validate_json(pinned.read_text())
            sections = ("base", "detector", "detection", "tasks", "adapter", "finetune")
            if before.stage_digest(*sections) != recipe.stage_digest(*sections):
                raise InvalidRecipeError(
                    f"{root} holds the adapters of another recipe: choose another --out, or "
                    "delete it"
                )
            made_by = ("encoder", "generator", "context", "functional")
            functional = [run.functional_generator(seed) for seed in before.generator_seeds]
            trained = (run.generator, run.state("generator"), *functional)
            made = [path for path in trained if path.exists()]
            if made and before.stage_digest(*made_by) != recipe.stage_digest(*made_by):
                raise InvalidRecipeError(
                    f"{root} holds the generator of another recipe: choose another --out, or "
                    f"delete {' and '.join(map(str, made))} to train it again on the same adapters"
                )
        write_text(pinned, recipe.model_dump_json(indent=2) + "\n")
        return run

    @classmethod
    def read(cls, root: Path) -> "RunDir":
        """Opens a finished or unfinished run by its folder alone.

        Raises:
            InvalidRecipeError: no run there.
        """
        pinned = root / "recipe.json"
        if not pinned.exists():
            raise InvalidRecipeError(f"no run in {root}: recipe.json is missing")
        return cls(root, Recipe.model_validate_json(pinned.read_text()))

    @property
    def base(self) -> Path:
        """Base model that the run itself trained."""
        return self.root / "base"

    @property
    def bases(self) -> Path:
        """Frozen bases."""
        return self.root / "bases.safetensors"

    def adapter(self, task: str, seed: int) -> Path:
        """Late checkpoints of one task and fine-tuning seed."""
        return self.root / "adapters" / f"{task}.{seed}.safetensors"

    @property
    def task_vectors(self) -> Path:
        """Encoded wordings."""
        return self.root / "task_vectors.safetensors"

    @property
    def generator(self) -> Path:
        """Trained conditional VAE."""
        return self.root / "generator.safetensors"

    def seeded_generator(self, seed: int) -> Path:
        """The generator of a seed; the recipe's own seed is that of `generator`."""
        return (
            self.generator
            if seed == self.recipe.seed
            else self.root / f"generator.{seed}.safetensors"
        )

    def functional_generator(self, seed: int) -> Path:
        """The generator of a seed after training through the base, where the recipe has that."""
        return self.root / f"functional.{seed}.safetensors"

    @property
    def seed_adapters(self) -> Path:
        """What further generators make of each task's first held-out wording, `TASK.SEED`."""
        return self.root / "seed_adapters.safetensors"

    @property
    def own_adapters(self) -> Path:
        """Mean late checkpoint of each task; never part of the bundle."""
        return self.root / "own_adapters.safetensors"

    @property
    def bundle(self) -> Path:
        """The bundle's folder."""
        return self.root / "bundle"

    def state(self, name: str) -> Path:
        """Resumable state of an unfinished piece of work."""
        return self.root / "state" / f"{name}.safetensors"

    def log(self, **fields: Any) -> None:
        """Appends one line to metrics.jsonl, with the wall-clock time in seconds."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **fields}) + "\n")

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Claims a piece of work among processes on one run; False if another one has it.

        The claim is an advisory file lock, so it ends with the process however it dies.
        """
        path = self.root / "state" / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
