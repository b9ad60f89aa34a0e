"""The layout: flatten and unflatten are inverse, and its digest pins what a vector means."""

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidAdapterError, InvalidInputError
from service.synthesis.layout import AdaptedModule, AdapterKind, AdapterLayout
from tests.fixtures.kernel import PROPERTY, TinyNet, layouts, normal

MODULES = (AdaptedModule("layers.0.q_proj", 8, 6), AdaptedModule("layers.1.q_proj", 5, 4))


def make_layout(kind: AdapterKind = AdapterKind.LORA, **changes: Any) -> AdapterLayout:
    return AdapterLayout(**{"kind": kind, "rank": 2, "alpha": 4.0, "modules": MODULES} | changes)


@PROPERTY
@given(layouts(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_flatten_inverts_unflatten(layout: AdapterLayout, dtype: torch.dtype) -> None:
    vector = normal(layout.num_params).to(dtype)

    tensors = layout.unflatten(vector)

    assert torch.equal(layout.flatten(tensors), vector)
    for key, entry in layout.spans.items():
        assert tensors[key].shape == entry.shape


@PROPERTY
@given(layouts(), st.randoms())
def test_unflatten_inverts_flatten_whatever_the_order(layout: AdapterLayout, random: Any) -> None:
    tensors = {key: normal(*e.shape, seed=e.offset) for key, e in layout.spans.items()}
    shuffled = list(tensors.items())
    random.shuffle(shuffled)

    restored = layout.unflatten(layout.flatten(dict(shuffled)))

    assert all(torch.equal(restored[key], tensor) for key, tensor in tensors.items())


@PROPERTY
@given(layouts())
def test_entries_cover_the_vector_without_gap_or_overlap(layout: AdapterLayout) -> None:
    covered = [i for e in layout.entries for i in range(e.span.start, e.span.stop)]

    assert covered == list(range(layout.num_params))


@PROPERTY
@given(layouts())
def test_json_round_trip(layout: AdapterLayout) -> None:
    restored = AdapterLayout.from_json(json.loads(json.dumps(layout.to_json())))

    assert restored == layout
    assert restored.digest == layout.digest


@PROPERTY
@given(layouts(), st.data())
def test_any_change_to_its_json_is_detected(layout: AdapterLayout, data: st.DataObject) -> None:
    body = copy.deepcopy(layout.to_json())
    field = data.draw(st.sampled_from(["kind", "rank", "alpha", "path", "in", "out", "drop"]))
    module = data.draw(st.sampled_from(body["modules"]))
    match field:
        case "kind":
            others = [kind.value for kind in AdapterKind if kind is not layout.kind]
            body["kind"] = data.draw(st.sampled_from(others))
        case "rank" | "alpha":
            body[field] += 1
        case "path":
            module[0] += "_"
        case "in" | "out":
            module[1 if field == "in" else 2] += 1
        case "drop":
            body["modules"].remove(module)

    with pytest.raises(InvalidAdapterError, match=r"digest|malformed"):
        AdapterLayout.from_json(body)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "dora"},
        {"rank": None},
        {"alpha": "much"},
        {"alpha": float("nan")},
        {"rank": float("inf")},
        {"modules": []},
        {"modules": [["q_proj", 8]]},
        {"modules": None},
    ],
)
def test_malformed_json_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidAdapterError, match="malformed"):
        AdapterLayout.from_json(make_layout().to_json() | change)


@pytest.mark.parametrize("key", ["kind", "rank", "alpha", "modules", "digest"])
def test_json_with_a_key_missing_is_refused(key: str) -> None:
    body = make_layout().to_json()
    del body[key]

    with pytest.raises(InvalidAdapterError, match=key):
        AdapterLayout.from_json(body)


def test_digest_depends_on_everything_that_gives_a_vector_its_meaning() -> None:
    renamed = (AdaptedModule("layers.0.k_proj", 8, 6), MODULES[1])
    resized = (AdaptedModule("layers.0.q_proj", 9, 6), MODULES[1])
    variants = [
        make_layout(kind, **changes)
        for kind in AdapterKind
        for changes in (
            {},
            {"rank": 3},
            {"alpha": 5.0},
            {"modules": MODULES[::-1]},
            {"modules": renamed},
            {"modules": resized},
        )
    ]

    assert len({layout.digest for layout in variants}) == len(variants)


@pytest.mark.parametrize(
    ("kind", "num_params"),
    [
        (AdapterKind.LORA, 2 * (8 + 6) + 2 * (5 + 4)),
        (AdapterKind.LORA_SHARED_A, 2 * 6 + 2 * 4),
        (AdapterKind.CORE, 2 * 2 + 2 * 2),
    ],
)
def test_number_of_trained_values(kind: AdapterKind, num_params: int) -> None:
    assert make_layout(kind).num_params == num_params


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules": ()}, "at least one module"),
        ({"modules": (MODULES[0], MODULES[0])}, "twice"),
        ({"rank": 0}, r"choose 1\.\.4"),
        ({"rank": 5}, r"choose 1\.\.4"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": float("inf")}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
    ],
)
def test_impossible_layouts_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        make_layout(**changes)


def test_from_model_selects_by_role_in_model_order() -> None:
    layout = AdapterLayout.from_model(
        TinyNet(), kind="core", rank=2, alpha=2, target_modules=["v_proj", "q_proj"]
    )

    assert [(m.path, m.in_features, m.out_features) for m in layout.modules] == [
        ("layers.0.q_proj", 6, 8),
        ("layers.0.v_proj", 6, 4),
        ("layers.1.q_proj", 6, 8),
        ("layers.1.v_proj", 6, 4),
    ]
    assert layout.roles == ("q_proj", "v_proj")
    assert layout.scaling == 1.0


def test_from_model_names_the_target_that_matches_nothing() -> None:
    with pytest.raises(InvalidInputError, match="k_proj"):
        AdapterLayout.from_model(
            TinyNet(), kind="core", rank=2, alpha=2, target_modules=["q_proj", "k_proj"]
        )


def test_flatten_refuses_what_does_not_fit() -> None:
    layout = make_layout()
    tensors = layout.unflatten(normal(layout.num_params))
    key = ("layers.0.q_proj", "lora_A")

    with pytest.raises(InvalidAdapterError, match="missing"):
        layout.flatten({k: v for k, v in tensors.items() if k != key})
    with pytest.raises(InvalidAdapterError, match="does not know"):
        layout.flatten(tensors | {("layers.9.q_proj", "lora_A"): torch.zeros(2, 8)})
    with pytest.raises(InvalidAdapterError, match=r"\(8, 2\), expected \(2, 8\)"):
        layout.flatten(tensors | {key: torch.zeros(8, 2)})


@pytest.mark.parametrize("difference", [-1, 1])
def test_unflatten_refuses_another_length(difference: int) -> None:
    layout = make_layout()

    with pytest.raises(InvalidAdapterError, match="expected"):
        layout.unflatten(torch.zeros(layout.num_params + difference))
