"""Prompted scenes: their shares, their negatives, and seeds."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from service.errors import InvalidTaskDataError
from service.inference.base_model import BaseModel
from service.inference.embedded_detector import build_embedded_detector
from service.synthesis.attachment import Attachment
from service.synthesis.bases import AdapterBases
from service.synthesis.layout import AdapterLayout
from tests.fixtures.tiny_scenes import CATEGORIES, draw_stored_scenes, make_tasks
from training.adapters import fine_tune
from training.detection_examples import build_detection_loss, draw_examples, encode_scenes
from training.detector_prompts import build_processor
from training.recipe import DetectionSection, FinetuneSection
from training.tasks.composites import CompositeScenes
from training.tasks.detection_task import DetectionData
from training.tasks.scene_store import ScenePool, StoredScenes

SECTION = DetectionSection(present_share=0.6, own_prompt_share=0.7)
TASKS = make_tasks(*CATEGORIES)
BALL, CUBE = TASKS


class Scenes:
    """A source of scenes that are pixels of one colour."""

    def __init__(self, stored: StoredScenes) -> None:
        self.objects = stored.objects

    def read_pixels(self, index: int) -> Tensor:
        return torch.full((3, 40, 50), 10 * (index + 1), dtype=torch.uint8)


SCENES = Scenes(draw_stored_scenes(40))


def holds(scene: int, category: str) -> bool:
    return any(each.category == category for each in SCENES.objects[scene])


def test_shares_are_those_of_the_recipe() -> None:
    examples = draw_examples(BALL, TASKS, SCENES, SECTION, 1000, seed=0)
    own = sum(prompt in BALL.descriptions for prompt in examples.prompts)

    assert len(examples.scenes) == len(examples.prompts) == 1000
    assert sum(holds(scene, "ball") for scene in examples.scenes.tolist()) == 600
    assert own / 1000 == pytest.approx(0.7, abs=0.05)
    assert set(examples.prompts) == {*BALL.descriptions, *CUBE.descriptions}


def test_prompts_of_others_come_with_and_without_the_object() -> None:
    examples = draw_examples(BALL, TASKS, SCENES, SECTION, 1000, seed=0)
    kinds = Counter(
        (holds(scene, "ball"), prompt in BALL.descriptions)
        for scene, prompt in zip(examples.scenes.tolist(), examples.prompts, strict=True)
    )

    assert kinds[True, False] / 600 == pytest.approx(0.3, abs=0.07)
    assert kinds[False, False] / 400 == pytest.approx(0.3, abs=0.07)


def test_negatives_show_other_tasks_objects_and_nothing_at_all() -> None:
    examples = draw_examples(BALL, TASKS, SCENES, SECTION, 200, seed=0)
    negatives = [scene for scene in examples.scenes.tolist() if not holds(scene, "ball")]

    assert any(holds(scene, "cube") for scene in negatives)
    assert any(not SCENES.objects[scene] for scene in negatives)


def test_no_scene_comes_twice_before_all_came_once() -> None:
    counts = Counter(draw_examples(BALL, TASKS, SCENES, SECTION, 120, seed=0).scenes.tolist())
    present = [counts[i] for i in range(40) if holds(i, "ball")]
    absent = [counts[i] for i in range(40) if not holds(i, "ball")]

    assert max(present) - min(present) <= 1
    assert max(absent) - min(absent) <= 1


def test_the_seed_decides() -> None:
    first, again = (draw_examples(BALL, TASKS, SCENES, SECTION, 50, seed=3) for _ in range(2))
    other = draw_examples(BALL, TASKS, SCENES, SECTION, 50, seed=4)

    assert torch.equal(first.scenes, again.scenes)
    assert first.prompts == again.prompts
    assert not torch.equal(first.scenes, other.scenes)
    assert first.prompts != other.prompts


def test_a_lonely_task_has_its_own_prompts_only() -> None:
    examples = draw_examples(BALL, (BALL,), SCENES, SECTION, 50, seed=0)

    assert set(examples.prompts) == set(BALL.descriptions)


def test_nothing_is_drawn_of_unseen_tasks() -> None:
    examples = draw_examples(BALL, TASKS, SCENES, SECTION, 100, seed=0, unseen=["cube"])

    assert set(examples.prompts) == set(BALL.descriptions)
    drawn = examples.scenes.tolist()
    assert not any(holds(scene, "cube") for scene in drawn)
    assert sum(holds(scene, "ball") for scene in drawn) == 60


def test_where_every_scene_holds_the_object_there_are_no_negatives() -> None:
    stored = draw_stored_scenes(20, empty_every=0)
    balls = replace(stored, objects=stored.objects[::2])
    examples = draw_examples(BALL, TASKS, Scenes(balls), SECTION, 50, seed=0)

    assert len(examples.scenes) == 50
    assert int(examples.scenes.max()) < len(balls.objects)


def test_a_task_without_an_object_is_refused() -> None:
    (lamp,) = make_tasks("lamp")
    with pytest.raises(InvalidTaskDataError, match=r"no training scene holds .*'lamp'"):
        draw_examples(lamp, (*TASKS, lamp), SCENES, SECTION, 50, seed=0)


@pytest.fixture(scope="module")
def base() -> BaseModel:
    processor = build_processor(words for task in TASKS for words in task.descriptions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_embedded_detector(
            processor.tokenizer, width=32, layers=1, heads=2, feed_forward=32
        )
        model.get_input_embeddings().weight.data.mul_(10)  # so that hidden states can say much
    return BaseModel(
        "tiny", "0", model.eval().requires_grad_(False), processor.tokenizer, processor
    )


def test_an_adapter_learns_from_its_examples_and_the_base_does_not(
    base: BaseModel, tmp_path: Path
) -> None:
    section = FinetuneSection(
        num_windows=32, batch_size=8, epochs=12, keep_last=2, learning_rate=0.01
    )
    layout = AdapterLayout.from_model(
        base.model,
        kind="lora",
        rank=4,
        alpha=8.0,
        target_modules=["q_proj", "v_proj", "fc1", "fc2"],
    )
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    attachment = Attachment(base.model, AdapterBases.from_model(layout, base.model, 0))
    stored = draw_stored_scenes(40)
    pool = ScenePool("train", "train", CATEGORIES, 40, 0)
    scenes = CompositeScenes(pool, stored, Path())
    data = DetectionData(TASKS, scenes, scenes, scenes)
    measure = build_detection_loss(base, BALL, data, SECTION, num_examples=32, seed=0)
    everything = torch.arange(32)
    with torch.no_grad():
        untrained = float(measure(everything))
    kept = fine_tune(
        base,
        attachment,
        measure,
        section,
        seed=0,
        state_path=tmp_path / "state.safetensors",
        report=lambda _step, _loss: None,
    )
    attachment.rows.vectors = kept[-1:]
    with torch.no_grad():
        trained = float(measure(everything))
    attachment.detach(base.model)

    assert kept.shape == (2, layout.num_params)
    assert trained < 0.95 * untrained
    for name, parameter in base.model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_features_are_the_towers_or_those_that_are_stored(base: BaseModel) -> None:
    stored = draw_stored_scenes(5)
    encoded = encode_scenes(base, Scenes(stored), range(5))
    pool = ScenePool("test", "test", CATEGORIES, 5, 0)

    assert encoded.shape == stored.features.shape
    assert encoded.dtype == torch.float16
    alone = base.processor.image_processor([Scenes(stored).read_pixels(4)], return_tensors="pt")
    expected = base.model.model.vision_tower(alone["pixel_values"]).last_hidden_state.half()
    assert torch.equal(encoded[4:], expected)
    kept = encode_scenes(base, CompositeScenes(pool, stored, Path()), [4, 1])
    assert torch.equal(kept, stored.features[[4, 1]])
