"""Task vectors: made by the encoder that the recipe names, and not mistaken for others."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from service.errors import InvalidRecipeError
from service.inference.base_model import EMBEDDED_TINY, BaseModel, load_base_model
from service.synthesis.task_encoder import HiddenStateEncoder, OpenClipTextEncoder
from tests.fixtures.tiny_open_clip import TinyOpenClip
from tests.fixtures.tiny_training import draw_task_vectors
from training.recipe import BaseSection, EncoderSection
from training.task_vectors import TaskVectors, encode_tasks, encoder_spec
from training.tasks.text import TextTask

TASKS = tuple(
    TextTask(
        name=name,
        title=name.title(),
        descriptions=(f"write {name}", f"continue the {name}"),
        heldout_descriptions=(f"some {name}",),
        train=tuple(f"{name} document {number}" for number in range(5)),
        test=(f"unseen {name}",),
    )
    for name in ("recipes", "news", "code")
)
SPEC = {"kind": "open_clip_text", "model": "ViT-L-14", "pretrained": "openai"}


def refuse_base() -> BaseModel:
    raise AssertionError("no base is needed")


def write_vectors(path: Path) -> TaskVectors:
    vectors = draw_task_vectors(tasks=3, wordings=2)
    vectors.write(path, SPEC, TASKS)
    return vectors


def test_write_and_read_round_trip(tmp_path: Path) -> None:
    written = write_vectors(tmp_path / "x.safetensors")

    read = TaskVectors.read(tmp_path / "x.safetensors", SPEC, TASKS)

    assert read.encoder_id == written.encoder_id
    assert torch.equal(read.rows, written.rows)
    assert torch.equal(read.owner, written.owner)
    assert (read.dim, read.num_tasks) == (12, 3)


def test_another_encoder_is_refused(tmp_path: Path) -> None:
    write_vectors(tmp_path / "x.safetensors")

    with pytest.raises(InvalidRecipeError, match="delete it to redo it"):
        TaskVectors.read(tmp_path / "x.safetensors", SPEC | {"pretrained": "laion"}, TASKS)


@pytest.mark.parametrize(
    "descriptions",
    [("write recipes",), ("write recipes", "cook"), ("continue it", "write it", "x")],
)
def test_other_wordings_are_refused(tmp_path: Path, descriptions: tuple[str, ...]) -> None:
    write_vectors(tmp_path / "x.safetensors")
    changed = dataclasses.replace(TASKS[0], descriptions=descriptions)

    with pytest.raises(InvalidRecipeError, match="other wordings"):
        TaskVectors.read(tmp_path / "x.safetensors", SPEC, (changed, *TASKS[1:]))


def test_other_tasks_are_refused(tmp_path: Path) -> None:
    write_vectors(tmp_path / "x.safetensors")

    for tasks in (TASKS[::-1], TASKS[:2]):
        with pytest.raises(InvalidRecipeError):
            TaskVectors.read(tmp_path / "x.safetensors", SPEC, tasks)


def test_leave_one_out_similarities_by_hand() -> None:
    rows = functional.normalize(torch.tensor([[1.0, 0], [1, 1], [0, 1], [-1, 0], [-1, 1]]), dim=1)
    vectors = TaskVectors("hand", rows, torch.tensor([0, 0, 0, 1, 1]))

    half = 0.5**0.5  # every wording's best partner of its own task is 45 degrees away
    torch.testing.assert_close(vectors.leave_one_out_similarities(), torch.full((5,), half))


def test_leave_one_out_similarities_are_sorted_and_ignore_other_tasks() -> None:
    vectors = draw_task_vectors(tasks=4, wordings=5)

    similarities = vectors.leave_one_out_similarities()

    expected = []
    for task in range(4):
        own = vectors.of_task(task)
        cosines = own @ own.T - 2 * torch.eye(5)
        expected += cosines.amax(1).tolist()
    torch.testing.assert_close(similarities, torch.tensor(sorted(expected)))


def test_words_are_encoded_task_by_task(tiny_open_clip: TinyOpenClip) -> None:
    section = EncoderSection(
        kind="open_clip_text", model=tiny_open_clip.model, pretrained=str(tiny_open_clip.weights)
    )
    encoder = OpenClipTextEncoder(tiny_open_clip.model, str(tiny_open_clip.weights))

    vectors = encode_tasks(section, TASKS, refuse_base)

    assert vectors.encoder_id == encoder.encoder_id
    assert vectors.owner.tolist() == [0, 0, 1, 1, 2, 2]
    for index, task in enumerate(TASKS):
        torch.testing.assert_close(vectors.of_task(index), encoder.encode(task.descriptions))


def test_hidden_states_average_n_documents_a_row(tmp_path: Path) -> None:
    base = load_base_model(EMBEDDED_TINY, device="cpu", dtype="float32", cache_dir=tmp_path)
    encoder = HiddenStateEncoder(base.model, base.tokenizer, base.digest)
    section = EncoderSection(kind="hidden_states", num_samples=2)

    vectors = encode_tasks(section, TASKS, lambda: base)

    assert vectors.encoder_id == encoder.encoder_id
    assert vectors.owner.tolist() == [0, 0, 1, 1, 2, 2]
    documents = TASKS[1].train
    for row, samples in enumerate(((documents[0], documents[2]), (documents[1], documents[3]))):
        expected = encoder.encode_examples(samples)
        torch.testing.assert_close(vectors.of_task(1)[row], expected)


def test_images_are_refused_for_text() -> None:
    with pytest.raises(InvalidRecipeError, match="needs tasks with images"):
        encode_tasks(EncoderSection(kind="open_clip_image"), TASKS, refuse_base)


def test_the_specification_names_what_builds_the_encoder_again() -> None:
    base = BaseSection(reference="some/base")
    words = EncoderSection(kind="open_clip_text", model="ViT-L-14", pretrained="openai")
    states = EncoderSection(kind="hidden_states", num_samples=4)

    assert encoder_spec(words, base) == SPEC
    assert encoder_spec(states, base) == {
        "kind": "hidden_states",
        "base": "some/base",
        "num_samples": 4,
    }
