"""The probe sees what every adapted linear of a base sees, text and detection."""

import torch

from service.adapters.validity import AdapterRuler, Probe, calibrate_gate
from service.inference.base_model import BaseModel, load_base_model
from service.inference.probe import capture_probe
from service.synthesis.bundle import Bundle
from service.synthesis.synthesizer import Synthesizer
from tests.fixtures.tiny_bundle import TinyBundle
from tests.fixtures.tiny_detection_bundle import TinyDetectionBundle


def check_probe(base: BaseModel, bundle: Bundle, synthesizer: Synthesizer) -> None:
    probe = capture_probe(base, bundle.layout)

    assert list(probe.inputs) != []
    for module in bundle.layout.modules:
        inputs = probe.inputs[module.path]
        linear = base.model.get_submodule(module.path)
        assert inputs.shape[1] == module.in_features
        assert 1 <= len(inputs) <= 16
        with torch.inference_mode():
            norm = float(linear(inputs.to(base.dtype)).float().norm())
        torch.testing.assert_close(norm, probe.outputs[module.path], rtol=0.02, atol=1e-3)
        assert not linear._forward_hooks
    again = capture_probe(base, bundle.layout)
    assert isinstance(again, Probe)
    assert again.outputs == probe.outputs
    gate = calibrate_gate(synthesizer, probe)
    vector = synthesizer.decode(bundle.task_vectors[0])
    gate.check(vector)
    assert AdapterRuler(bundle.bases, probe).measure(vector).effect > 0


def test_text(tiny_bundle: TinyBundle) -> None:
    base = load_base_model(
        tiny_bundle.bundle.base_reference,
        device="cpu",
        dtype="float32",
        cache_dir=tiny_bundle.cache_dir,
    )
    check_probe(base, tiny_bundle.bundle, tiny_bundle.synthesizer)


def test_detection(tiny_detection_bundle: TinyDetectionBundle) -> None:
    base = load_base_model(
        "bundle:base", device="cpu", dtype="float32", bundle_folder=tiny_detection_bundle.folder
    )
    check_probe(base, tiny_detection_bundle.bundle, tiny_detection_bundle.synthesizer)
