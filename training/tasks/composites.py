"""The detection tasks of composited cut-outs: 24 categories, half of which the base knows.

`wide` tasks are these and 18 more, of objects that are in the other tasks' scenes for distraction.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

from training.progress import show_progress
from training.tasks.cache import default_cache_dir
from training.tasks.cutouts import (
    CATEGORIES_FILE,
    WIDE_CATEGORIES_FILE,
    Part,
    load_cutouts,
)
from training.tasks.detection_task import (
    Annotation,
    DetectionData,
    DetectionTask,
    build_detection_task,
)
from training.tasks.scene_store import ScenePool, StoredScenes, load_scenes, make_composer
from training.tasks.scenes import SceneComposer
from training.tasks.text_task import read_wordings, select_names

WORDINGS_FILE = Path(__file__).with_name("detection_wordings.toml")
WIDE_WORDINGS_FILE = WORDINGS_FILE.with_name("detection_wide_wordings.toml")

POOLS: dict[str, tuple[Part, int, int]] = {
    "adapters": ("train", 12_000, 1),
    "validation": ("validation", 500, 2),
    "test": ("test", 800, 3),
}
"""Split, number of scenes and stream of the pools with objects of every category."""


@dataclass(frozen=True)
class CompositeScenes:
    """Scenes of a pool; pictures are composed anew, features were computed once."""

    pool: ScenePool
    stored: StoredScenes
    cache_dir: Path

    @property
    def objects(self) -> Sequence[tuple[Annotation, ...]]:
        """Annotations of each scene."""
        return self.stored.objects

    def read_pixels(self, index: int) -> UInt8[Tensor, "3 height width"]:
        """Picture of one scene."""
        return self._composer.compose(index).pixels

    @cached_property
    def _composer(self) -> SceneComposer:
        return make_composer(self.pool, self.cache_dir)


def load_composites(
    names: Sequence[str] | None = None, cache_dir: Path | None = None, *, wide: bool = False
) -> DetectionData:
    """Tasks and scenes; everything is fetched, composed and encoded on first use.

    Scenes hold objects of all categories whatever tasks are asked for. Not every wide category has
    one for validation.

    Raises:
        InvalidInputError: an unknown task.
        MissingDependencyError: the pictures or the tower's weights cannot be had here.
    """
    cache_dir = cache_dir or default_cache_dir()
    categories = read_categories(wide=wide)
    wordings = read_wordings(WORDINGS_FILE)
    if wide:
        wordings = {**wordings, **read_wordings(WIDE_WORDINGS_FILE)}
    tasks = tuple(
        build_detection_task(name, wordings[name])
        for name in select_names(tuple(categories), names)
    )
    cutouts = load_cutouts(cache_dir, wide=True)[0] if wide else ()
    scenes = {}
    for name, (part, count, stream) in POOLS.items():
        pool = ScenePool(name, part, tuple(categories), count, stream)
        if wide:
            shown = {each.category for each in cutouts if each.part == part}
            kept = tuple(category for category in categories if category in shown)
            pool = replace(pool, name=f"wide-{name}", categories=kept, wide=True)
        scenes[name] = CompositeScenes(pool, _load(pool, cache_dir), cache_dir)
    return DetectionData(tasks, scenes["adapters"], scenes["validation"], scenes["test"])


def read_base_tasks() -> tuple[tuple[DetectionTask, ...], tuple[str, ...]]:
    """The base's own tasks, and every training wording of all tasks, for its tokenizer."""
    wordings = read_wordings(WORDINGS_FILE)
    tasks = tuple(
        build_detection_task(name, wordings[name])
        for name, is_base in read_categories().items()
        if is_base
    )
    return tasks, tuple(words for each in wordings.values() for words in each.descriptions)


def load_base_scenes(count: int, cache_dir: Path | None = None) -> StoredScenes:
    """Scenes with objects of the base categories only, for the base's own training."""
    base = tuple(name for name, is_base in read_categories().items() if is_base)
    return _load(ScenePool("base", "train", base, count, 0), cache_dir or default_cache_dir())


def read_categories(*, wide: bool = False) -> dict[str, bool]:
    """Every category, and whether the base is trained on it."""
    files = (CATEGORIES_FILE, WIDE_CATEGORIES_FILE) if wide else (CATEGORIES_FILE,)
    rules = [tomllib.loads(path.read_text(encoding="utf-8"))["categories"] for path in files]
    return {name: bool(rule.get("base")) for each in rules for name, rule in each.items()}


def _load(pool: ScenePool, cache_dir: Path) -> StoredScenes:
    with show_progress(f"scenes {pool.name}", pool.count) as report:
        return load_scenes(pool, cache_dir, report)
