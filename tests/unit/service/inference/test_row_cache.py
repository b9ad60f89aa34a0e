"""The row cache against transformers' own cache, while rows join, move and leave."""

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, MistralConfig

from service.errors import InvalidInputError
from service.inference.row_cache import COLUMNS_STEP, RowCache, check_attention
from tests.fixtures.tiny_engine import load_random_base


@pytest.mark.parametrize("lengths", [[3, 17, 1], [COLUMNS_STEP - 1, COLUMNS_STEP, 5]])
@torch.no_grad()
def test_steps_give_the_logits_of_each_row_alone(tmp_path: Path, lengths: list[int]) -> None:
    model = load_random_base(tmp_path).model
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 200, (n + 8,), generator=generator).tolist() for n in lengths]
    cache, rows = RowCache(model.config), [0, 1]

    def join(row: int, length: int) -> None:
        read = DynamicCache(config=model.config)
        model(torch.tensor([texts[row][:length]]), past_key_values=read, use_cache=True)
        cache.append(read, [0], [length])

    def step() -> None:
        ids = [texts[row][length] for row, length in zip(rows, cache.lengths, strict=True)]
        positions, mask = cache.begin_step()
        logits = model(
            input_ids=torch.tensor(ids)[:, None],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
        ).logits[:, -1]
        for index, row in enumerate(rows):
            alone = model(torch.tensor([texts[row][: cache.lengths[index]]])).logits[0, -1]
            torch.testing.assert_close(logits[index], alone, atol=1e-5, rtol=1e-5)

    join(0, lengths[0])
    join(1, lengths[1])
    step()
    step()
    rows.append(2)
    join(2, lengths[2])
    step()
    cache.remove(0)  # the last row takes its place
    rows[:] = [2, 1]
    step()
    cache.remove(1)
    rows[:] = [2]
    step()
    assert cache.num_rows == 1
    assert cache.get_seq_length() == cache.lengths[0] == lengths[2] + 3


@torch.no_grad()
def test_a_row_gets_nothing_of_a_failed_one_that_had_its_memory(tmp_path: Path) -> None:
    model = load_random_base(tmp_path).model
    cache = RowCache(model.config)
    for length, factor in ((9, 1.0), (30, float("nan")), (5, 1.0)):
        read = DynamicCache(config=model.config)
        model(torch.arange(1, length + 1)[None], past_key_values=read, use_cache=True)
        for layer in read.layers:
            layer.keys.mul_(factor)
            layer.values.mul_(factor)
        cache.append(read, [0], [length])
    cache.remove(1, wipe=True)  # the row of 5 tokens takes the place
    positions, mask = cache.begin_step()
    logits = model(
        input_ids=torch.tensor([[10], [6]]),
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
    ).logits[:, -1]
    for index, length in enumerate((10, 6)):
        alone = model(torch.arange(1, length + 1)[None]).logits[0, -1]
        torch.testing.assert_close(logits[index], alone, atol=1e-5, rtol=1e-5)


def test_other_attention_is_refused() -> None:
    check_attention(MistralConfig(sliding_window=None))
    with pytest.raises(InvalidInputError, match="full attention"):
        check_attention(MistralConfig(sliding_window=16))
