"""Training of the embedded detector: the frozen base that detection adapters are for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from service.inference.base_model import resolve_device
from service.inference.embedded_detector import (
    GRID,
    NUM_BINS,
    EmbeddedDetector,
    build_embedded_detector,
    encode_positions,
    save_embedded_detector,
)
from training.box_objective import (
    BoxVocabulary,
    SmoothedBoxLoss,
    build_box_batch,
    run_detector,
)
from training.checkpoint import optimizer_tensors, read_tensors, restore_optimizer, write_tensors
from training.detector_prompts import build_processor
from training.progress import Report
from training.recipe import DetectorSection
from training.schedule import warm_cosine
from training.tasks.detection_task import Annotation, Box, DetectionTask
from training.tasks.scene_store import StoredScenes

SAVE_EVERY_STEPS = 250
STATISTICS_SCENES = 2000
LOCATION_STD = 0.06


def train_detector(
    folder: Path,
    scenes: StoredScenes,
    tasks: Sequence[DetectionTask],
    all_wordings: Sequence[str],
    section: DetectorSection,
    *,
    seed: int,
    state_path: Path,
    report: Report,
) -> None:
    """Trains the detector on its base categories and writes it as a folder.

    Each step shows scenes with a prompt for a category that is there, or (in a share of the
    rows) for one that is not, whose answer is empty. Batches follow from (seed, step) alone:
    a killed run resumes to the same bytes.

    Args:
        folder: where the trained detector is written.
        scenes: with objects of the base categories only.
        tasks: the base categories; their training wordings are the prompts.
        all_wordings: of every task, for the tokenizer.
        section: sizes, steps and rates.
        seed: of weights and batches.
        state_path: resumable state, removed once the detector is written.
        report: called after every step.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        processor = build_processor(all_wordings)
        model = build_embedded_detector(
            processor.tokenizer,
            width=section.width,
            layers=section.layers,
            heads=section.heads,
            feed_forward=section.feed_forward,
        )
        cells = nn.Linear(section.width, 5)  # of the auxiliary loss, not part of the detector
    vocabulary = BoxVocabulary.of(model, processor)
    _initialize(model, scenes, vocabulary)
    device = resolve_device("auto")
    for module in (model, cells):
        nn.Module.to(module, device)  # in place
    set_dropout(model, section.dropout)
    # Fused attention is the slower one here: its backward pass takes half of the step.
    model.model.language_model.set_attn_implementation("eager")
    prompts = {
        task.name: [processor.tokenizer(words)["input_ids"] for words in task.descriptions]
        for task in tasks
    }
    parameters = [p for p in [*model.parameters(), *cells.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=section.learning_rate, weight_decay=0.01)
    loss_function = SmoothedBoxLoss(vocabulary, section.smoothing_bins)
    first_step = 0
    if state_path.exists():
        first_step = _restore(state_path, model, cells, optimizer)
    for step in range(first_step, section.num_steps):
        random = torch.Generator().manual_seed(seed * 1_000_003 + step)
        torch.manual_seed(seed * 1_000_003 + step)  # of dropout
        chosen, words, boxes = draw_batch(scenes.objects, prompts, section, random)
        batch = build_box_batch(vocabulary, words, boxes).to(device)
        pictures = scenes.features[chosen].to(device).float()
        for group in optimizer.param_groups:
            share = warm_cosine(step, section.num_steps, section.num_steps // 50, floor=0.01)
            group["lr"] = section.learning_rate * share
        with torch.autocast(device.type, torch.bfloat16):
            logits, encoded = run_detector(model, pictures, batch)
        loss = loss_function(logits, batch.labels)
        auxiliary = measure_cells(cells(encoded[:, : GRID * GRID].float()), boxes)
        (loss + section.cell_weight * auxiliary).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % SAVE_EVERY_STEPS == 0:
            tensors = {**_trained_state(model, cells), **optimizer_tensors(optimizer)}
            write_tensors(state_path, tensors, {"step": str(step + 1)})
        report(step + 1, loss=loss.item(), cells=auxiliary.item())
    set_dropout(model, 0.0)
    model.eval()  # type: ignore[no-untyped-call]
    save_embedded_detector(folder, model, processor)
    state_path.unlink(missing_ok=True)


def draw_batch(
    objects: Sequence[Sequence[Annotation]],
    prompts: Mapping[str, Sequence[Sequence[int]]],
    section: DetectorSection,
    random: torch.Generator,
) -> tuple[Tensor, list[Sequence[int]], list[list[Box]]]:
    """Scenes, and for each a prompt and the boxes of its answer."""
    chosen = torch.randint(len(objects), (section.batch_size,), generator=random)
    words, boxes = [], []
    for index in chosen.tolist():
        there = sorted({each.category for each in objects[index]} & set(prompts))
        absent = sorted(set(prompts) - set(there))
        is_there = bool(there) and float(torch.rand((), generator=random)) < section.present_share
        pool = there if is_there else absent
        category = pool[int(torch.randint(len(pool), (), generator=random))]
        wordings = prompts[category]
        words.append(wordings[int(torch.randint(len(wordings), (), generator=random))])
        boxes.append([each.box for each in objects[index] if each.category == category])
    return chosen, words, boxes


def measure_cells(
    predicted: Float[Tensor, "batch tokens 5"], boxes: Sequence[Sequence[Box]]
) -> Float[Tensor, ""]:
    """Auxiliary loss: every cell tells whether its centre lies in an asked-for object, and where.

    Binary cross-entropy of that, plus in cells inside the L1 distance of the box's four sides
    from the cell's centre.
    """
    centers = (torch.arange(GRID) + 0.5) / GRID
    x, y = centers.repeat(GRID), centers.repeat_interleave(GRID)  # [tokens]
    inside = torch.zeros(predicted.shape[:2])
    sides = torch.zeros(*predicted.shape[:2], 4)
    for row, found in enumerate(boxes):
        for x1, y1, x2, y2 in found:
            within = (x > x1) & (x < x2) & (y > y1) & (y < y2)
            offsets = torch.stack([x - x1, y - y1, x2 - x, y2 - y], dim=1)
            inside[row, within] = 1.0
            sides[row, within] = offsets[within]
    inside, sides = inside.to(predicted.device), sides.to(predicted.device)
    there = functional.binary_cross_entropy_with_logits(predicted[..., 0], inside)
    distance = (predicted[..., 1:] - sides).abs().mean(-1)
    return there + (distance * inside).sum() / inside.sum().clamp_min(1.0)


def set_dropout(model: EmbeddedDetector, share: float) -> None:
    """Sets the dropout of every BART layer; a trained detector has none."""
    for module in model.model.language_model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = share
    model.model.language_model.train(share > 0)


def _initialize(model: EmbeddedDetector, scenes: StoredScenes, vocabulary: BoxVocabulary) -> None:
    """Feature statistics, and location tokens that start as what they mean."""
    sample = scenes.features[:STATISTICS_SCENES].float().flatten(2)  # [scenes, features, tokens]
    projector: Any = model.model.multi_modal_projector
    projector.feature_mean.copy_(sample.mean((0, 2)))
    projector.feature_std.copy_(sample.std((0, 2)).clamp_min(1e-3))
    embedding: Any = model.get_input_embeddings().weight
    first = vocabulary.first_location
    positions = (torch.arange(NUM_BINS) + 0.5) / NUM_BINS
    waves = encode_positions(positions, embedding.shape[1]) * LOCATION_STD
    with torch.no_grad():
        embedding[first : first + NUM_BINS] = waves


def _trained_state(model: EmbeddedDetector, cells: nn.Linear) -> dict[str, Tensor]:
    trained = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    return {**trained, **{f"cells.{name}": p for name, p in cells.named_parameters()}}


def _restore(path: Path, model: EmbeddedDetector, cells: nn.Linear, optimizer: Any) -> int:
    tensors, metadata = read_tensors(path)
    with torch.no_grad():
        for name, parameter in _trained_state(model, cells).items():
            parameter.copy_(tensors[name])
    restore_optimizer(optimizer, tensors)
    return int(metadata["step"])
