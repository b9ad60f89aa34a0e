"""The validity gate: norms from small factors are those of the expanded update; what it refuses."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from service.adapters.record import AdapterRecord
from service.adapters.validity import (
    AdapterGates,
    AdapterRuler,
    Probe,
    ValidityGate,
    calibrate_gate,
)
from service.errors import InvalidAdapterError
from service.synthesis.adapter_recipe import AdapterRecipe
from service.synthesis.bases import AdapterBases
from service.synthesis.layout import AdapterKind, AdapterLayout
from service.synthesis.synthesizer import Synthesizer
from tests.fixtures.kernel import WordEncoder, adapt_tiny_net, normal, write_word_bundle

KINDS = list(AdapterKind)


def make_probe(layout: AdapterLayout) -> Probe:
    return Probe(
        {m.path: normal(5, m.in_features, seed=i) for i, m in enumerate(layout.modules)},
        {m.path: 1.0 + i for i, m in enumerate(layout.modules)},
    )


def expand(layout: AdapterLayout, bases: AdapterBases, vector: Tensor) -> list[Tensor]:
    return [layout.scaling * (up @ down) for down, up in bases.expand(vector).values()]


def make_gate(kind: AdapterKind) -> tuple[ValidityGate, AdapterLayout, list[Tensor]]:
    _, layout, bases = adapt_tiny_net(kind)
    training = [normal(layout.num_params, seed=seed).half() for seed in range(8)]
    return ValidityGate(AdapterRuler(bases, make_probe(layout)), training), layout, training


@pytest.mark.parametrize("kind", KINDS)
def test_measures_are_those_of_the_expanded_update(kind: AdapterKind) -> None:
    _, layout, bases = adapt_tiny_net(kind)
    probe = make_probe(layout)
    vector = normal(layout.num_params, seed=3).half()

    measures = AdapterRuler(bases, probe).measure(vector)

    updates = expand(layout, bases, vector.float())
    torch.testing.assert_close(
        measures.frobenius, torch.stack([torch.linalg.matrix_norm(each) for each in updates])
    )
    torch.testing.assert_close(
        measures.spectral, torch.stack([torch.linalg.matrix_norm(each, 2) for each in updates])
    )
    said = [
        probe.inputs[module.path] @ update.T
        for module, update in zip(layout.modules, updates, strict=True)
    ]
    base = sum(value**2 for value in probe.outputs.values()) ** 0.5
    expected = float(torch.stack([each.norm() for each in said]).norm()) / base
    assert measures.effect == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_training_adapters_pass_at_any_strength(kind: AdapterKind) -> None:
    gate, layout, training = make_gate(kind)
    for strength in (0.1, 1.0, 4.0):
        for vector in training:
            scaled = vector.clone()
            for entry in layout.entries:
                if entry.tensor != "lora_A":
                    scaled[entry.span] *= strength
            gate.check(scaled, strength=strength)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_refused_says_where_and_how_much(kind: AdapterKind) -> None:
    gate, layout, training = make_gate(kind)
    module = layout.modules[3].path
    spans = [entry.span for entry in layout.entries if entry.module == module]

    def alter(factor: float) -> Tensor:
        vector = training[0].clone()
        for span in spans:
            vector[span] *= factor
        return vector

    cases = [
        (alter(float("nan")), "not_finite", module),
        (alter(float("inf")), "not_finite", module),
        (alter(30.0), "frobenius", f"{module}: .* norm is .*, outside of [0-9.]+ to"),
        (alter(0.0), "frobenius", f"{module}: .* norm is 0, outside of"),
        (torch.zeros(layout.num_params), "frobenius", "modules are outside"),
        (torch.zeros(3), "layout", "expected"),
    ]
    for vector, reason, message in cases:
        with pytest.raises(InvalidAdapterError, match=message) as refusal:
            gate.check(vector)
        assert refusal.value.reason == reason
        assert refusal.value.status == 422
    with pytest.raises(InvalidAdapterError):
        gate.check(training[0], strength=40.0)


def test_an_update_that_the_probe_does_not_feel_is_refused() -> None:
    """Norms of the right size, in directions that no input has."""
    _, layout, bases = adapt_tiny_net(AdapterKind.LORA)
    training = [normal(layout.num_params, seed=seed) for seed in range(8)]
    probe = make_probe(layout)
    blind = {path: torch.cat([x[:, :1], 0 * x[:, 1:]], dim=1) for path, x in probe.inputs.items()}
    gate = ValidityGate(AdapterRuler(bases, Probe(blind, probe.outputs)), training)
    deaf = training[0].clone()
    for entry in layout.entries:
        if entry.tensor == "lora_A":
            deaf[entry.span].view(entry.shape)[:, 0] = 0

    with pytest.raises(InvalidAdapterError, match="effect on a probe prompt is 0 of") as refusal:
        gate.check(deaf)
    assert refusal.value.reason == "effect"


def test_the_gates_of_bundles_count_what_they_refuse(tmp_path: Path) -> None:
    bundle = write_word_bundle(tmp_path / "bundle")
    synthesizer = Synthesizer(bundle, WordEncoder())
    refused: list[str] = []
    gate = calibrate_gate(synthesizer, make_probe(bundle.layout))
    gates = AdapterGates({bundle.digest: gate}, refused.append)
    recipe = AdapterRecipe.build(
        task="write a newspaper article", bundle_digest=bundle.digest, strength=2.0
    )
    record = AdapterRecord.from_synthesized(synthesizer.synthesize(recipe), bundle.layout)
    gates.check(record)
    assert not refused

    record.vector.mul_(100)
    with pytest.raises(InvalidAdapterError):
        gates.check(record)
    assert refused == ["frobenius"]
    AdapterGates({}).check(record)  # of a bundle that is not in service
