import math
from pathlib import Path

import pytest
import torch

from service.inference.base_model import EMBEDDED_TINY, BaseModel, load_base_model
from service.synthesis.attachment import Attachment
from service.synthesis.bases import AdapterBases
from service.synthesis.layout import AdapterLayout
from training.adapters import cut_windows, tokenize_documents
from training.evaluation.text import sum_window_nll


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    cache: Path = tmp_path_factory.mktemp("cache")
    return load_base_model(EMBEDDED_TINY, dtype="float32", cache_dir=cache)


def test_summed_nll_is_that_of_transformers_own_loss(base: BaseModel) -> None:
    layout = AdapterLayout.from_model(
        base.model, kind="core", rank=4, alpha=4, target_modules=["q_proj"]
    )
    attachment = Attachment(base.model, AdapterBases.from_model(layout, base.model))
    windows = cut_windows(tokenize_documents(base, ["some text to measure " * 40]), 5, 33, 0)

    nll = sum_window_nll(base, attachment, None, windows)
    zeros = sum_window_nll(base, attachment, torch.zeros(layout.num_params), windows)
    attachment.detach(base.model)

    for window, measured in zip(windows, nll, strict=True):
        loss = base.model(input_ids=window[None], labels=window[None]).loss
        assert float(measured) == pytest.approx(float(loss) * 32, rel=1e-5)
    assert torch.allclose(nll, zeros, rtol=1e-5)
    # A random byte model is near the uniform distribution over its vocabulary.
    assert float(nll.mean()) / 32 == pytest.approx(math.log(257), rel=0.05)
