"""Task vectors of pictures: of the objects alone, of training and of validation scenes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from service.errors import InvalidRecipeError, InvalidTaskDataError
from tests.fixtures.tiny_reproduction import write_pictures
from training.image_vectors import build_image_encoder, encode_pictures
from training.recipe import EncoderSection
from training.tasks.detection import load_detection_data
from training.tasks.detection_task import DetectionData

SECTION = EncoderSection(kind="open_clip_image", model="embedded:conse", num_samples=2)


@dataclass
class ColorEncoder:
    """The mean colour of the pictures, which are counted."""

    encoder_id: str = "color"
    seen: int = 0

    def encode_examples(self, images: Sequence[Image.Image]) -> Float[Tensor, " dim"]:
        self.seen += len(images)
        means = [np.asarray(image).reshape(-1, 3).mean(0) for image in images]
        return torch.nn.functional.normalize(torch.tensor(np.mean(means, 0)).float(), dim=0)


@pytest.fixture
def data(tmp_path: Path) -> DetectionData:
    return load_detection_data(f"coco:{write_pictures(tmp_path / 'pictures')}")


def test_each_task_is_seen_in_its_own_objects(data: DetectionData) -> None:
    encoder = ColorEncoder()

    vectors, unseen = encode_pictures(SECTION, encoder, data)

    assert [task.name for task in data.tasks] == ["sofa", "chair"]
    assert vectors.encoder_id == "color"
    assert vectors.owner.tolist() == [0, 0, 1, 1]  # as many as training wordings
    assert unseen.shape == (2, 3)
    for rows, channel in ((vectors.of_task(0), 0), (vectors.of_task(1), 2)):
        assert (rows.argmax(1) == channel).all()
    assert unseen.argmax(1).tolist() == [0, 2]
    assert encoder.seen <= 2 * (4 + 2)  # no more than `num_samples` a vector


def test_a_task_without_pictures_is_an_error(data: DetectionData) -> None:
    empty = replace(data.train, objects=((),) * len(data.train.objects))

    with pytest.raises(InvalidTaskDataError, match="0 scenes hold an object of task 'sofa'"):
        encode_pictures(SECTION, ColorEncoder(), replace(data, train=empty))


def test_an_encoder_of_words_reads_no_pictures() -> None:
    with pytest.raises(InvalidRecipeError, match="reads no pictures"):
        build_image_encoder(EncoderSection(kind="open_clip_text", model="embedded:minilm-l6-v2"))
