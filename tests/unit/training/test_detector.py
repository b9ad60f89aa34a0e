"""Training of the embedded detector: it learns, and a killed run resumes to the same bytes."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

import training.detector
from service.inference.base_model import load_base_model
from service.inference.embedded_detector import FEATURES, GRID, NUM_BINS, EmbeddedDetector
from tests.fixtures.tiny_scenes import CATEGORIES, draw_stored_scenes, make_tasks
from training.box_objective import BoxVocabulary, build_box_batch, run_detector
from training.detector import draw_batch, measure_cells, set_dropout, train_detector
from training.recipe import DetectorSection
from training.tasks.detection_task import Box

TASKS = make_tasks(*CATEGORIES)
SCENES = draw_stored_scenes(40)


def make_section(num_steps: int, **changes: float) -> DetectorSection:
    sizes = {"width": 32, "layers": 1, "heads": 2, "feed_forward": 64, "num_scenes": 40}
    rest = {"batch_size": 16, "learning_rate": 5e-3, "dropout": 0.0, "num_steps": num_steps}
    return DetectorSection.model_validate({**sizes, **rest, **changes})


def train(
    folder: Path,
    section: DetectorSection,
    report: Callable[[int, float], None] = lambda _step, _loss: None,
) -> Path:
    train_detector(
        folder / "base",
        SCENES,
        TASKS,
        [words for task in TASKS for words in task.descriptions],
        section,
        seed=0,
        state_path=folder / "detector.safetensors",
        report=lambda step, **values: report(step, values["loss"]),
    )
    return folder / "base"


def test_it_learns_a_few_scenes_by_heart(tmp_path: Path) -> None:
    losses: list[float] = []
    folder = train(
        tmp_path,
        make_section(150, smoothing_bins=4.0),
        report=lambda _step, loss: losses.append(loss),
    )
    base = load_base_model(str(folder), device="cpu", dtype="float32")

    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert base.modality == "detection"
    assert not (tmp_path / "detector.safetensors").exists()
    assert all(not isinstance(m, nn.Module) or not m.training for m in base.model.modules())
    projector = base.model.model.multi_modal_projector
    expected = SCENES.features.float().mean((0, 2, 3))
    torch.testing.assert_close(projector.feature_mean, expected, rtol=1e-2, atol=1e-2)


class KilledError(Exception):
    """Stands for a signal that ends the process between two steps."""


@pytest.mark.parametrize("killed_at", [3, 7])
def test_a_killed_training_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    monkeypatch.setattr(training.detector, "SAVE_EVERY_STEPS", 3)
    section = make_section(9, dropout=0.2)

    def kill(step: int, _loss: float) -> None:
        if step == killed_at:
            raise KilledError

    whole = train(tmp_path / "whole", section)
    with pytest.raises(KilledError):
        train(tmp_path / "killed", section, kill)
    steps: list[int] = []
    resumed = train(tmp_path / "killed", section, lambda step, _loss: steps.append(step))

    assert steps[0] == killed_at // 3 * 3 + 1
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in resumed.iterdir())
    for name in names:
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name


def test_a_written_detector_answers_as_the_trained_one(tmp_path: Path) -> None:
    folder = train(tmp_path, make_section(2))
    first, again = (load_base_model(str(folder), device="cpu", dtype="float32") for _ in range(2))
    vocabulary = BoxVocabulary.of(first.model, first.processor)
    words = first.tokenizer("Find every ball.")["input_ids"]
    batch = build_box_batch(vocabulary, [words], [[SCENES.objects[0][0].box]])
    features = SCENES.features[:1].float()
    logits, encoded = run_detector(first.model, features, batch)

    assert isinstance(first.model, EmbeddedDetector)
    assert first.digest == again.digest
    assert logits.shape == (1, 5, len(first.tokenizer))
    assert encoded.shape[1] == GRID * GRID + len(words) + 2
    assert features.shape[1] == FEATURES
    assert vocabulary.first_location + NUM_BINS == len(first.tokenizer)
    torch.testing.assert_close(run_detector(again.model, features, batch)[0], logits)


def draw(seed: int, section: DetectorSection) -> tuple[list[int], list[int], list[list[Box]]]:
    prompts: dict[str, list[Sequence[int]]] = {"ball": [[0]], "cube": [[1]]}
    random = torch.Generator().manual_seed(seed)
    chosen, words, boxes = draw_batch(SCENES.objects, prompts, section, random)
    return chosen.tolist(), [row[0] for row in words], boxes


def test_a_batch_asks_for_what_is_there_and_for_what_is_not() -> None:
    section = make_section(1, batch_size=2000, present_share=0.75)
    chosen, asked, boxes = draw(0, section)
    assert draw(0, section) == (chosen, asked, boxes)
    assert draw(1, section) != (chosen, asked, boxes)

    full = [i for i, scene in enumerate(chosen) if SCENES.objects[scene]]
    for row, scene in enumerate(chosen):
        category = ("ball", "cube")[asked[row]]
        there = [o.box for o in SCENES.objects[scene] if o.category == category]
        assert boxes[row] == there
    share = sum(bool(boxes[row]) for row in full) / len(full)
    assert share == pytest.approx(0.75, abs=0.04)


def test_cells_inside_a_box_know_how_far_its_sides_are() -> None:
    box = (0.2, 0.4, 0.7, 0.9)
    centers = (torch.arange(GRID) + 0.5) / GRID
    y, x = (side.flatten() for side in torch.meshgrid(centers, centers, indexing="ij"))
    inside = (x > 0.2) & (x < 0.7) & (y > 0.4) & (y < 0.9)
    right = torch.stack(
        [torch.where(inside, 30.0, -30.0), x - 0.2, y - 0.4, 0.7 - x, 0.9 - y], dim=1
    )

    assert measure_cells(right[None], [[box]]).item() == pytest.approx(0.0, abs=1e-6)
    off = right + torch.tensor([0.0, 0.1, 0.1, 0.1, 0.1])
    assert measure_cells(off[None], [[box]]).item() == pytest.approx(0.1, abs=1e-5)
    assert measure_cells(right[None], [[]]).item() > 1.0
    assert measure_cells(-right[None] * 0 - 30.0, [[]]).item() == pytest.approx(0.0, abs=1e-6)


def test_dropout_is_that_of_every_layer(tmp_path: Path) -> None:
    base = load_base_model(str(train(tmp_path, make_section(1))), device="cpu", dtype="float32")
    language = base.model.model.language_model
    set_dropout(base.model, 0.3)
    layers = [*language.encoder.layers, *language.decoder.layers]
    assert [layer.dropout for layer in layers] == [0.3, 0.3]
    assert all(layer.training for layer in layers)
    set_dropout(base.model, 0.0)
    assert [layer.dropout for layer in layers] == [0.0, 0.0]
    assert not any(layer.training for layer in layers)
