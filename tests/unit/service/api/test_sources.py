"""What a request may name, and how the model names of the OpenAI routes are read."""

import pytest

from service.api.requests import InferRequest
from service.api.sources import Selector, parse_model

REFERENCE = "embedded:smollm2-135m"
ID = "5f0c" * 16


@pytest.mark.parametrize(
    ("name", "selector"),
    [
        ("base", Selector(base=True)),
        (REFERENCE, Selector(base=True)),
        ("task:Write a recipe.", Selector(task="Write a recipe.")),
        ("task:", Selector(task="")),
        (ID, Selector(adapter_id=ID)),
        (ID[:-1], Selector(alias=ID[:-1])),
        (ID.upper(), Selector(alias=ID.upper())),
        ("Base", Selector(alias="Base")),
        ("", Selector(alias="")),
    ],
)
def test_model_names(name: str, selector: Selector) -> None:
    assert parse_model(name, REFERENCE) == selector


def test_infer_names_the_base_only_by_its_name() -> None:
    def select(adapter_id: str) -> Selector:
        return Selector.from_request(InferRequest(adapter_id=adapter_id, prompt="x"))

    assert select("base") == Selector(base=True)
    assert select("BASE") == Selector(adapter_id="BASE")


def test_a_selector_names_exactly_one() -> None:
    with pytest.raises(AssertionError):
        Selector()
    with pytest.raises(AssertionError):
        Selector(task="Write a recipe.", base=True)
