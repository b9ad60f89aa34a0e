"""LoRAs trained elsewhere: what fits is the same update, what does not is refused with numbers."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from service.adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE, render_peft_files
from service.adapters.peft_import import read_peft_upload
from service.errors import InvalidAdapterError
from service.synthesis.bases import AdapterBases
from service.synthesis.layout import AdapterKind, AdapterLayout

KINDS = list(AdapterKind)


def build(kind: AdapterKind, rank: int = 4) -> tuple[AdapterLayout, AdapterBases]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"q_proj": nn.Linear(24, 16), "v_proj": nn.Linear(24, 12)})
    layout = AdapterLayout.from_model(
        model, kind=kind, rank=rank, alpha=6.0, target_modules=["q_proj", "v_proj"]
    )
    return layout, AdapterBases.from_model(layout, model)


def draw(layout: AdapterLayout, seed: int = 1) -> Tensor:
    return torch.randn(layout.num_params, generator=torch.Generator().manual_seed(seed)).half()


def export(layout: AdapterLayout, bases: AdapterBases, vector: Tensor) -> tuple[bytes, bytes]:
    files = render_peft_files(layout, bases, vector, "base")
    return files[CONFIG_FILE], files[WEIGHTS_FILE]


def expand(layout: AdapterLayout, bases: AdapterBases, vector: Tensor) -> dict[str, Tensor]:
    return {path: layout.scaling * up @ down for path, (down, up) in bases.expand(vector).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_comes_back_byte_for_byte(kind: AdapterKind) -> None:
    layout, bases = build(kind)
    for seed in range(10):
        vector = draw(layout, seed)
        again = read_peft_upload(*export(layout, bases, vector), layout, bases)
        assert torch.equal(again, vector)


@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (3, 12.0), (4, 2.0)])
def test_a_smaller_rank_and_another_alpha_are_the_same_update(rank: int, alpha: float) -> None:
    layout, bases = build(AdapterKind.LORA)
    small, small_bases = build(AdapterKind.LORA, rank)
    vector = draw(small)
    config, weights = export(small, small_bases, vector)
    body = json.dumps(json.loads(config) | {"lora_alpha": alpha}).encode()
    read = read_peft_upload(body, weights, layout, bases)
    expected = expand(small, small_bases, vector)
    for path, update in expand(layout, bases, read).items():
        wanted = expected[path] * (alpha / small.alpha)
        assert torch.allclose(update, wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", [AdapterKind.LORA_SHARED_A, AdapterKind.CORE])
def test_what_frozen_factors_cannot_express_is_refused_with_the_residual(kind: AdapterKind) -> None:
    layout, bases = build(kind)
    foreign, foreign_bases = build(AdapterKind.LORA)
    config, weights = export(foreign, foreign_bases, draw(foreign))
    with pytest.raises(InvalidAdapterError, match=r"_proj: 0\.\d+ of the update lies outside"):
        read_peft_upload(config, weights, layout, bases)


def test_a_small_part_outside_is_lost_and_a_larger_one_is_refused() -> None:
    layout, bases = build(AdapterKind.CORE)
    vector = draw(layout)
    config, weights = export(layout, bases, vector)
    tensors = safetensors.torch.load(weights)
    key = "base_model.model.q_proj.lora_A.weight"
    noise = torch.randn(tensors[key].shape, generator=torch.Generator().manual_seed(5))
    noise *= tensors[key].norm() / noise.norm()
    for scale, fits in ((1e-4, True), (1e-2, False)):
        changed = safetensors.torch.save({**tensors, key: tensors[key] + scale * noise})
        if fits:
            read = read_peft_upload(config, changed, layout, bases)
            assert torch.allclose(read.float(), vector.float(), rtol=1e-2, atol=1e-2)
        else:
            with pytest.raises(InvalidAdapterError, match="lies outside"):
                read_peft_upload(config, changed, layout, bases)


def test_an_update_of_zero_lies_in_every_span() -> None:
    layout, bases = build(AdapterKind.CORE)
    files = export(layout, bases, torch.zeros(layout.num_params).half())
    assert not read_peft_upload(*files, layout, bases).any()


def edit_config(**changes: Any) -> Callable[[bytes, bytes], tuple[bytes, bytes]]:
    return lambda config, weights: (
        json.dumps(json.loads(config) | changes).encode(),
        weights,
    )


def edit_tensors(
    change: Callable[[dict[str, Tensor]], None],
) -> Callable[[bytes, bytes], tuple[bytes, bytes]]:
    def edit(config: bytes, weights: bytes) -> tuple[bytes, bytes]:
        tensors = safetensors.torch.load(weights)
        change(tensors)
        return config, safetensors.torch.save(tensors)

    return edit


KEY = "base_model.model.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c, w: (b"{", w), "cannot read adapter_config.json"),
        (lambda c, w: (b"[]", w), "not a JSON object"),
        (lambda c, w: (b"[" * 100_000, w), "cannot read adapter_config.json"),
        (lambda c, w: (c, b"\x80\x04pickle"), "pickles are not loaded"),
        (lambda c, w: (c, w[:-3]), "cannot read adapter_model.safetensors"),
        (lambda c, w: (c, b""), "cannot read adapter_model.safetensors"),
        (edit_config(r=8), "shapes"),
        (edit_config(r=0), "r is 0"),
        (edit_config(r=True), "r is True"),
        (edit_config(lora_alpha=-1), "lora_alpha is -1"),
        (edit_config(lora_alpha="x"), "lora_alpha is 'x'"),
        (edit_config(use_dora=True), "more than a plain LoRA"),
        (edit_config(use_rslora=True), "more than a plain LoRA"),
        (edit_config(rank_pattern={"q": 1}), "more than a plain LoRA"),
        (edit_config(peft_type="IA3"), "peft_type"),
        (edit_config(init_lora_weights="pissa"), "init_lora_weights"),
        (edit_tensors(lambda t: t.pop(KEY)), "lacks 1 tensor"),
        (edit_tensors(lambda t: t.update({"other": t[KEY].clone()})), "not named as PEFT"),
        (
            edit_tensors(lambda t: t.update({KEY.replace("q_proj", "k_proj"): t[KEY].clone()})),
            "has 1 tensor",
        ),
        (edit_tensors(lambda t: t[KEY].fill_(torch.nan)), "not finite"),
        (edit_tensors(lambda t: t.update({KEY: t[KEY].int()})), "not floats"),
        (edit_tensors(lambda t: t[KEY].fill_(1e30)), "not finite"),
    ],
)
def test_what_does_not_fit_is_refused(
    edit: Callable[[bytes, bytes], tuple[bytes, bytes]], message: str
) -> None:
    layout, bases = build(AdapterKind.LORA)
    config, weights = edit(*export(layout, bases, draw(layout)))
    with pytest.raises(InvalidAdapterError, match=message):
        read_peft_upload(config, weights, layout, bases)


def test_a_larger_rank_is_refused() -> None:
    layout, bases = build(AdapterKind.LORA)
    large, large_bases = build(AdapterKind.LORA, 6)
    with pytest.raises(InvalidAdapterError, match="rank 6, and this bank holds up to 4"):
        read_peft_upload(*export(large, large_bases, draw(large)), layout, bases)
