"""Prompts are scored as transformers scores them: the same tokens, after others."""

from pathlib import Path

import pytest
import torch

from service.errors import InvalidInputError
from service.inference.base_model import EMBEDDED_TINY, BaseModel, load_base_model
from training.adapters import cut_windows, measure_nll, read_prefix, tokenize_documents
from training.baselines.prompt import prompt_with_description, prompt_with_examples


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    cache: Path = tmp_path_factory.mktemp("cache")
    return load_base_model(EMBEDDED_TINY, dtype="float32", cache_dir=cache)


@torch.no_grad()
def test_the_windows_alone_are_scored(base: BaseModel) -> None:
    windows = cut_windows(tokenize_documents(base, ["some text to measure " * 40]), 3, 33, 0)
    prefix = prompt_with_description(base, "Write a recipe.")

    read = read_prefix(base, prefix)
    read.batch_repeat_interleave(len(windows))
    nll = measure_nll(base, windows, read).sum(1)

    for window, measured in zip(windows, nll, strict=True):
        ids = torch.cat([prefix, window])[None]
        labels = ids.clone()
        labels[0, : len(prefix) + 1] = -100
        loss = base.model(input_ids=ids, labels=labels).loss
        assert float(measured) == pytest.approx(float(loss) * 32, rel=1e-5)
    assert not torch.allclose(nll, measure_nll(base, windows).sum(1))


def test_a_description_stands_in_a_line_of_its_own(base: BaseModel) -> None:
    prefix = prompt_with_description(base, "Write a recipe.")
    assert base.tokenizer.decode(prefix) == "Write a recipe.\n\n"


def test_examples_share_the_tokens_and_end_each(base: BaseModel) -> None:
    prefix = prompt_with_examples(base, ["first " * 50, "second"], 40)
    end = base.tokenizer.eos_token
    assert len(prefix) <= 40
    first, second, rest = base.tokenizer.decode(prefix).split(end)
    assert ("first " * 50).startswith(first)
    assert (second, rest) == ("second", "")
    for examples, tokens in (([], 40), (["a"] * 8, 15)):
        with pytest.raises(InvalidInputError, match="at least one example"):
            prompt_with_examples(base, examples, tokens)
