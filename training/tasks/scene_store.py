"""Scenes as the frozen image tower sees them: features computed once, kept in shards."""

import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from training.checkpoint import read_metadata, read_tensors, write_tensors
from training.tasks.cutouts import WIDE_CATEGORIES_FILE, Part, load_cutouts
from training.tasks.detection_task import Annotation
from training.tasks.scenes import SceneComposer

SHARD_SCENES = 1000
STORE_FORMAT = 1  # raise it when scenes or tower change: stored features are then redone


@dataclass(frozen=True)
class ScenePool:
    """A named set of composited scenes.

    Attributes:
        name: of its folder.
        part: split that its objects and backgrounds are from.
        categories: that may be in a scene.
        count: number of scenes.
        stream: of the composer.
        wide: as of `load_cutouts`.
    """

    name: str
    part: Part
    categories: tuple[str, ...]
    count: int
    stream: int
    wide: bool = False

    def folder(self, cache_dir: Path) -> Path:
        """Where its shards lie."""
        return cache_dir / "detection" / f"scenes-v{STORE_FORMAT}" / self.name

    def shard_sizes(self) -> list[int]:
        """Scenes of each shard."""
        full, rest = divmod(self.count, SHARD_SCENES)
        return [SHARD_SCENES] * full + [rest] * (rest > 0)


@dataclass(frozen=True)
class StoredScenes:
    """Features and objects of a pool's scenes.

    Attributes:
        features: of the image tower, float16.
        objects: annotations of each scene.
    """

    features: Float[Tensor, "scenes features rows columns"]
    objects: tuple[tuple[Annotation, ...], ...]


def load_scenes(
    pool: ScenePool, cache_dir: Path, report: Callable[[int], None] = lambda _done: None
) -> StoredScenes:
    """Computes the shards that are missing, on all cores, and reads them all.

    Args:
        pool: which scenes.
        cache_dir: where pictures and shards lie.
        report: called with the number of scenes that are there.
    """
    sizes = pool.shard_sizes()
    paths = [pool.folder(cache_dir) / f"{i:04d}.safetensors" for i in range(len(sizes))]
    description = _describe(pool)
    missing = [i for i, path in enumerate(paths) if not _is_current(path, description)]
    done = sum(size for i, size in enumerate(sizes) if i not in missing)
    report(done)
    if missing:
        load_cutouts(cache_dir)  # fetched here once, not by every worker
        workers = min(len(missing), os.cpu_count() or 1)
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as executor:
            jobs = {
                executor.submit(write_shard, pool, cache_dir, i, description): i for i in missing
            }
            for job in as_completed(jobs):
                job.result()
                done += sizes[jobs[job]]
                report(done)
    features, objects = [], list[tuple[Annotation, ...]]()
    for path in paths:
        tensors, metadata = read_tensors(path)
        features.append(tensors["features"])
        objects += [
            tuple(Annotation(category, instance, tuple(box)) for category, instance, box in scene)
            for scene in json.loads(metadata["objects"])
        ]
    return StoredScenes(torch.cat(features), tuple(objects))


def write_shard(pool: ScenePool, cache_dir: Path, number: int, description: str) -> None:
    """Composes the scenes of one shard and writes their features."""
    from service.inference.embedded_detector import EfficientNetTower

    torch.set_num_threads(1)
    tower = EfficientNetTower()
    composer = make_composer(pool, cache_dir)
    start = number * SHARD_SCENES
    scenes = [composer.compose(start + i) for i in range(pool.shard_sizes()[number])]
    features = []
    for group in torch.split(torch.stack([scene.pixels for scene in scenes]), 100):
        pixels = (group.float() / 255 - 0.5) / 0.5
        features.append(tower(pixels).last_hidden_state.half())
    objects = [[(o.category, o.instance, o.box) for o in scene.objects] for scene in scenes]
    write_tensors(
        pool.folder(cache_dir) / f"{number:04d}.safetensors",
        {"features": torch.cat(features)},
        {"made_from": description, "objects": json.dumps(objects)},
    )


def make_composer(pool: ScenePool, cache_dir: Path) -> SceneComposer:
    """The composer of a pool's scenes."""
    cutouts, backgrounds = load_cutouts(cache_dir, wide=pool.wide)
    return SceneComposer(cutouts, backgrounds, pool.part, pool.categories, pool.stream)


def _describe(pool: ScenePool) -> str:
    rules = [WIDE_CATEGORIES_FILE.read_text(encoding="utf-8")] if pool.wide else []
    return json.dumps([pool.part, pool.categories, pool.stream, *rules])


def _is_current(path: Path, description: str) -> bool:
    return path.exists() and read_metadata(path).get("made_from") == description
