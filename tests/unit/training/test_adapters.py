"""Fine-tuning: the loss is transformers', it falls, and a killed run resumes to the same bytes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import training.adapters
from service.errors import InvalidTaskDataError
from service.inference.base_model import EMBEDDED_TINY, BaseModel, load_base_model
from service.synthesis.attachment import Attachment, initial_vector
from service.synthesis.bases import AdapterBases
from service.synthesis.layout import AdapterKind, AdapterLayout
from tests.fixtures.kernel import PROPERTY
from tests.fixtures.tiny_training import make_recipe
from training.adapters import (
    cut_windows,
    fine_tune,
    learning_rate_at,
    measure_nll,
    tokenize_documents,
)
from training.checkpoint import read_tensors
from training.recipe import FinetuneSection

SECTION = make_recipe().finetune
"""Twelve steps of two windows in three epochs; a checkpoint every second step, three kept."""

TEXT = "Preheat the oven to 200 degrees. Mix flour, butter and sugar; bake for an hour. " * 20

Tune = Callable[..., Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    cache = tmp_path_factory.mktemp("cache")
    return load_base_model(EMBEDDED_TINY, device="cpu", dtype="float32", cache_dir=cache)


@pytest.fixture(scope="module")
def attachment(base: BaseModel) -> Iterator[Attachment]:
    layout = AdapterLayout.from_model(
        base.model,
        kind=AdapterKind.LORA,
        rank=2,
        alpha=4.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    )
    attachment = Attachment(base.model, AdapterBases.from_model(layout, base.model))
    yield attachment
    attachment.detach(base.model)


@pytest.fixture
def tune(base: BaseModel, attachment: Attachment, tmp_path: Path) -> Tune:
    """Fine-tunes on the text; the resumable state is in `tmp_path`."""

    def run(
        section: FinetuneSection = SECTION,
        *,
        seed: int = 0,
        state: str = "state",
        report: Callable[[int, float], None] = lambda step, loss: None,
    ) -> Tensor:
        windows = cut_windows(
            tokenize_documents(base, [TEXT]), section.num_windows, section.window_tokens, seed=0
        )

        def measure_loss(numbers: Tensor) -> Tensor:
            return training.adapters.measure_nll(base, windows[numbers]).mean()

        state_path = tmp_path / f"{state}.safetensors"
        return fine_tune(
            base,
            attachment,
            measure_loss,
            section,
            seed=seed,
            state_path=state_path,
            report=report,
        )

    return run


def stop_at(last: int) -> Callable[[int, float], None]:
    def report(step: int, loss: float) -> None:
        if step == last:
            raise KeyboardInterrupt

    return report


def test_nll_is_the_loss_of_transformers(base: BaseModel) -> None:
    windows = cut_windows(tokenize_documents(base, [TEXT]), 4, 16, seed=0)

    with torch.no_grad():
        nll = measure_nll(base, windows)
        expected = base.model(input_ids=windows, labels=windows).loss

    assert nll.shape == (4, 15)
    torch.testing.assert_close(nll.mean(), expected)


def test_the_loss_falls(tune: Tune) -> None:
    losses: list[float] = []
    section = SECTION.model_copy(update={"epochs": 10})

    tune(section, report=lambda step, loss: losses.append(loss))

    assert len(losses) == section.num_steps == 40
    assert sum(losses[-4:]) < sum(losses[:4]) - 4 * 0.3


def test_the_late_checkpoints_are_kept_in_order(tune: Tune) -> None:
    every = tune(SECTION.model_copy(update={"keep_last": 6}), state="every")
    last = tune(SECTION, state="last")

    assert last.shape == (3, every.shape[1])
    assert torch.equal(last, every[-3:])
    assert len({row.numpy().tobytes() for row in every}) == 6


def test_the_seed_determines_the_adapter(tune: Tune, attachment: Attachment) -> None:
    first = tune(seed=1, state="a")
    torch.manual_seed(5)  # the global generator does not matter

    assert torch.equal(tune(seed=1, state="b"), first)
    assert not torch.equal(tune(seed=2, state="c"), first)
    assert first.isfinite().all()
    assert not torch.equal(first[-1], initial_vector(attachment.layout, seed=1))


@pytest.mark.parametrize("stops", [[1], [2], [5], [11], [12], [3, 4, 7, 12]])
def test_a_killed_run_resumes_to_the_same_bytes(
    tune: Tune, tmp_path: Path, stops: list[int]
) -> None:
    uninterrupted = tune(state="uninterrupted")

    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            tune(state="killed", report=stop_at(stop))
    resumed = tune(state="killed")

    assert torch.equal(resumed, uninterrupted)
    files = [tmp_path / f"{name}.safetensors" for name in ("killed", "uninterrupted")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_resumed_run_does_not_repeat_finished_steps(tune: Tune, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(report=stop_at(7))
    assert read_tensors(tmp_path / "state.safetensors")[1] == {"step": "6"}

    steps: list[int] = []
    tune(report=lambda step, loss: steps.append(step))

    assert steps == [7, 8, 9, 10, 11, 12]


def test_an_epoch_passes_over_each_window_once(
    base: BaseModel, tune: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[Tensor] = []

    def record(base: BaseModel, windows: Tensor) -> Tensor:
        batches.append(windows)
        return measure_nll(base, windows)

    monkeypatch.setattr(training.adapters, "measure_nll", record)
    tune()

    epochs = [torch.cat(batches[start : start + 4]).tolist() for start in (0, 4, 8)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    windows = cut_windows(
        tokenize_documents(base, [TEXT]), SECTION.num_windows, SECTION.window_tokens, seed=0
    )
    assert sorted(epochs[0]) == sorted(windows.tolist())


def test_the_base_is_untouched_afterwards(tune: Tune, base: BaseModel) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = base.model(input_ids=ids).logits
    tune()
    with torch.no_grad():
        after = base.model(input_ids=ids).logits

    assert torch.equal(before, after)


@PROPERTY
@given(st.integers(1, 9), st.integers(0, 20), st.floats(0, 1), st.floats(1e-4, 1))
def test_learning_rate_warms_up_and_decays_to_its_floor(
    epochs: int, warmup: int, floor: float, peak: float
) -> None:
    section = SECTION.model_copy(
        update={
            "epochs": epochs,
            "warmup_steps": warmup,
            "final_learning_rate_share": floor,
            "learning_rate": peak,
        }
    )
    rates = [learning_rate_at(step, section) for step in range(section.num_steps)]

    assert all(0 < rate <= peak * (1 + 1e-9) for rate in rates[:-1])
    assert rates[0] == pytest.approx(peak / (warmup + 1))
    after = rates[warmup:]
    assert after == sorted(after, reverse=True)
    if section.num_steps > warmup + 1:
        assert rates[-1] == pytest.approx(peak * floor, abs=1e-12)


def test_documents_end_with_the_end_of_text(base: BaseModel) -> None:
    end = base.tokenizer.eos_token_id

    tokens = tokenize_documents(base, ["ab", "c"])

    a, b, c = (base.tokenizer(letter)["input_ids"][0] for letter in "abc")
    assert tokens.tolist() == [a, b, end, c, end]


@PROPERTY
@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 8), st.integers(0, 3), st.data())
def test_windows_are_distinct_aligned_cuts_of_the_stream(
    available: int, window: int, rest: int, seed: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, available))
    tokens = torch.arange(available * window + min(rest, window - 1))

    windows = cut_windows(tokens, count, window, seed)

    assert windows.shape == (count, window)
    starts = windows[:, 0].tolist()
    assert len(set(starts)) == count
    for start, row in zip(starts, windows, strict=True):
        assert start % window == 0
        assert torch.equal(row, tokens[start : start + window])
    assert torch.equal(windows, cut_windows(tokens, count, window, seed))


def test_windows_follow_from_the_seed() -> None:
    tokens = torch.arange(400)

    assert not torch.equal(cut_windows(tokens, 50, 8, 0), cut_windows(tokens, 50, 8, 1))


@pytest.mark.parametrize("num_tokens", [0, 15, 31])
def test_too_little_text_is_refused(num_tokens: int) -> None:
    message = f"2 windows of 16 tokens asked for, but the documents hold {num_tokens // 16}: add"

    with pytest.raises(InvalidTaskDataError, match=message):
        cut_windows(torch.arange(num_tokens), 2, 16, seed=0)
