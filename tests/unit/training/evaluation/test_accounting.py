"""Bytes: against files and tensors; break-even: against counting tasks."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidInputError
from service.inference.base_model import EMBEDDED_TINY, load_base_model
from service.synthesis.layout import AdapterKind
from service.synthesis.task_encoder import HiddenStateEncoder, OpenClipTextEncoder
from tests.fixtures.kernel import PROPERTY, WordEncoder, adapt_tiny_net, write_word_bundle
from tests.fixtures.tiny_bundle import TinyBundle
from tests.fixtures.tiny_open_clip import TinyOpenClip
from training.evaluation.accounting import (
    FP16_BYTES,
    INT8_BYTES,
    break_even,
    count_adapter_bytes,
    count_encoder_bytes,
    measure_storage,
)


@pytest.mark.parametrize("kind", AdapterKind)
def test_an_adapter_takes_the_bytes_of_its_tensors(kind: AdapterKind) -> None:
    _, layout, _ = adapt_tiny_net(kind)
    tensors = layout.unflatten(torch.zeros(layout.num_params, dtype=torch.float16)).values()

    assert count_adapter_bytes(layout, FP16_BYTES) == sum(each.nbytes for each in tensors)
    quantised = [(torch.zeros(each.shape, dtype=torch.int8), torch.zeros(1)) for each in tensors]
    assert count_adapter_bytes(layout, INT8_BYTES) == sum(
        values.nbytes + scale.nbytes for values, scale in quantised
    )


def test_a_bundles_parts_add_up_to_its_folder(tmp_path: Path) -> None:
    bundle = write_word_bundle(tmp_path)
    storage = measure_storage(bundle, WordEncoder())

    files = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert storage.generator + storage.bases == files
    assert storage.bases == (tmp_path / "bases.safetensors").stat().st_size
    assert storage.encoder == 0  # it has no weights
    assert storage.fp16_adapter == 2 * bundle.layout.num_params
    assert storage.int8_adapter == bundle.layout.num_params + 4 * len(bundle.layout.entries)


def test_an_encoder_takes_the_bytes_of_its_text_tower(tiny_open_clip: TinyOpenClip) -> None:
    encoder = OpenClipTextEncoder(tiny_open_clip.model, str(tiny_open_clip.weights))
    width, vocabulary, context, embedding = 16, 49408, 16, 12
    block = 3 * width * (width + 1) + width * (width + 1) + 8 * width * width + 5 * width
    tower = (vocabulary + context) * width + block + 2 * (2 * width) + 2 * width
    values = tower + width * embedding + 1  # the projection and the logit scale

    assert count_encoder_bytes(encoder) == 4 * values


def test_the_base_as_encoder_costs_nothing_more(tiny_bundle: TinyBundle) -> None:
    base = load_base_model(EMBEDDED_TINY, dtype="float32", cache_dir=tiny_bundle.cache_dir)
    encoder = HiddenStateEncoder(base.model, base.tokenizer, base.digest)

    assert count_encoder_bytes(encoder) == 0


@PROPERTY
@given(st.integers(0, 5000), st.integers(1, 300))
def test_break_even_is_the_first_number_of_tasks_that_takes_as_much(fixed: int, task: int) -> None:
    tasks = 0
    while tasks * task < fixed:
        tasks += 1
    assert break_even(fixed, task) == tasks


def test_break_even_counts_the_encoder_where_asked(tmp_path: Path) -> None:
    bundle = write_word_bundle(tmp_path)
    storage = measure_storage(bundle, WordEncoder())
    with_tower = type(storage)(storage.generator, 10**9, 5000, 100, 60)

    assert with_tower.break_even(100) == -(-(storage.generator + 5000) // 100)
    assert with_tower.break_even(60, with_encoder=False) == -(-storage.generator // 60)
    with pytest.raises(InvalidInputError, match="positive"):
        break_even(10, 0)
