"""Tasks by example texts over real HTTP: uvicorn, a tiny bundle and a tiny base model."""

import io
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
import torch
from safetensors.torch import load

from service.adapters.peft_format import render_peft_files
from service.inference.base_model import EMBEDDED_TINY, load_base_model
from service.synthesis.adapter_recipe import AdapterRecipe
from service.synthesis.example_tasks import MAX_EXAMPLE_TOKENS, ExampleTexts
from service.synthesis.synthesizer import SynthesizedAdapter
from service.synthesis.task_encoder import HiddenStateEncoder
from tests.fixtures.http_service import make_both_settings, make_settings, serve_in_thread
from tests.fixtures.tiny_bundle import TinyBundle, write_tiny_bundle
from tests.fixtures.tiny_detection_bundle import TinyDetectionBundle

RECIPE = "Write a cooking recipe."
TEXTS = ["import os", "import sys\n\nprint(sys.argv)", "def f():\n    return 1"]


@pytest.fixture(scope="module")
def client(
    tiny_bundle: TinyBundle, tiny_detection_bundle: TinyDetectionBundle
) -> Iterator[httpx2.Client]:
    settings = make_both_settings(tiny_bundle, tiny_detection_bundle)
    with serve_in_thread(settings) as running:
        yield running


def generate(client: httpx2.Client, **fields: Any) -> dict[str, Any]:
    response = client.post("/generate-lora", json=fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def refuse(client: httpx2.Client, **fields: Any) -> tuple[int, str, str]:
    response = client.post("/generate-lora", json=fields)
    body = response.json()
    return response.status_code, body["code"], body["detail"]


def synthesize(tiny: TinyBundle, texts: list[str], task: str | None = None) -> SynthesizedAdapter:
    """What the kernel makes of Eq. 1 of the bare base."""
    base = load_base_model(EMBEDDED_TINY, device="cpu", dtype="float32", cache_dir=tiny.cache_dir)
    encoder = HiddenStateEncoder(base.model, base.tokenizer, base.digest, MAX_EXAMPLE_TOKENS)
    examples = ExampleTexts.build(texts)
    recipe = AdapterRecipe.build_from_texts(examples, task=task, bundle_digest=tiny.bundle.digest)
    return tiny.synthesizer.synthesize(recipe, encoder.read_states(examples.texts).mean(0))


@pytest.mark.parametrize("task", [None, RECIPE])
def test_examples_become_the_adapter_of_equation_one(
    client: httpx2.Client, tiny_bundle: TinyBundle, task: str | None
) -> None:
    expected = synthesize(tiny_bundle, TEXTS, task)
    words = {} if task is None else {"task": task}

    answer = generate(client, examples=TEXTS, strength=1.0, **words)

    assert (answer["modality"], answer["adapter_id"]) == ("text", expected.adapter_id)
    recipe = answer["recipe"]
    assert (recipe["task"], recipe["examples"]) == (task or "", expected.recipe.examples)
    assert ("open_clip_text/" in recipe["encoder"]) == (task is not None)
    assert recipe["encoder"].endswith(f"hidden_states/{tiny_bundle.bundle.base_digest}/256")
    assert answer["nearest"][0]["name"] == expected.nearest[0].name
    assert answer["similarity"] == pytest.approx(expected.nearest[0].similarity, abs=1e-4)
    assert answer["in_distribution"] == expected.in_distribution
    assert not answer["regenerable"]
    stages = {"read_examples", "encode", "decode", "total"}
    assert stages <= set(answer["milliseconds"])
    assert answer["milliseconds"]["total"] > answer["milliseconds"]["read_examples"] > 0
    stages_seen = client.get("/metrics").text
    assert 'icm_lora_generation_stage_seconds_count{stage="read_examples"}' in stages_seen


def test_the_vector_is_that_of_the_bare_base_up_to_rounding(
    client: httpx2.Client, tiny_bundle: TinyBundle
) -> None:
    expected, bundle = synthesize(tiny_bundle, TEXTS), tiny_bundle.bundle
    answer = generate(client, examples=TEXTS)
    download = client.get(f"/v1/adapters/{answer['adapter_id']}/peft.zip").content
    with zipfile.ZipFile(io.BytesIO(download)) as archive:
        served = load(archive.read("adapter_model.safetensors"))
    files = render_peft_files(bundle.layout, bundle.bases, expected.vector, bundle.base_reference)
    made = load(files["adapter_model.safetensors"])
    torch.testing.assert_close(served, made, rtol=1e-2, atol=1e-3)


def test_equal_examples_are_one_adapter_and_are_read_once(client: httpx2.Client) -> None:
    texts = ["x = 1\r\ny = 2", "caf\u00e9"]
    first = generate(client, examples=texts)
    again = generate(client, examples=["cafe\u0301 ", "x = 1\ny = 2\n"])
    anew = generate(client, examples=texts, cache="bypass")
    assert (first["cache"], again["cache"], anew["cache"]) == ("miss", "hit", "bypass")
    assert "read_examples" not in again["milliseconds"]
    assert first["vector_sha256"] == again["vector_sha256"] == anew["vector_sha256"]
    other = generate(client, examples=texts[:1])
    assert other["vector_sha256"] != first["vector_sha256"]


def test_examples_are_read_between_the_steps_of_what_runs(client: httpx2.Client) -> None:
    texts = [f"Number {number} of many examples." for number in range(32)]
    alone = generate(client, examples=texts, cache="bypass")
    prompt = {"prompt": "Once upon a time", "max_tokens": 400}
    adapter = {**prompt, "adapter_id": alone["adapter_id"]}
    expected = [client.post("/infer", json=each).json() for each in
                (adapter, {**prompt, "adapter_id": "base"})]  # fmt: skip
    with ThreadPoolExecutor(8) as pool:
        running = [
            pool.submit(client.post, "/infer", json=each)
            for each in (adapter, {**prompt, "adapter_id": "base"})
        ]
        made = list(pool.map(lambda _: generate(client, examples=texts, cache="bypass"), range(3)))
        answers = [each.result().json() for each in running]
    assert {each["vector_sha256"] for each in made} == {alone["vector_sha256"]}
    assert [each["text"] for each in answers] == [each["text"] for each in expected]


def test_an_adapter_by_example_answers_and_can_be_named(client: httpx2.Client) -> None:
    adapter = generate(client, examples=TEXTS, strength=4)
    answer = client.post(
        "/infer",
        json={"prompt": "Preheat", "max_tokens": 8, "adapter_id": adapter["adapter_id"]},
    ).json()
    assert answer["receipt"]["vector_sha256"] == adapter["vector_sha256"]
    alias = client.put("/v1/aliases/shown", json={"adapter_id": adapter["adapter_id"]}).json()
    assert not alias["regenerable"]  # its examples are not kept
    found = client.get(f"/v1/adapters/{adapter['adapter_id']}").json()
    assert found["recipe"] == adapter["recipe"]


def test_examples_refine_the_adapter_within_what_is_asked_for(client: httpx2.Client) -> None:
    plain = generate(client, examples=TEXTS)
    assert (plain["refinement"], plain["recipe"]["refine_steps"]) == (None, 0)
    refined = generate(client, examples=TEXTS, refine_steps=3)
    assert refined["adapter_id"] != plain["adapter_id"]
    assert (refined["refinement"]["steps"], refined["recipe"]["refine_steps"]) == (3, 3)
    assert refined["refinement"]["loss_after"] <= refined["refinement"]["loss_before"]
    assert refined["milliseconds"]["total"] > refined["milliseconds"]["refine"] > 0
    again = generate(client, examples=TEXTS, refine_steps=3)
    assert (again["cache"], again["refinement"]) == ("hit", None)
    anew = generate(client, examples=TEXTS, refine_steps=3, cache="bypass")
    assert anew["vector_sha256"] == again["vector_sha256"] == refined["vector_sha256"]
    more = generate(client, examples=TEXTS, refine_steps=16)
    assert more["refinement"]["loss_after"] < more["refinement"]["loss_before"]
    assert more["vector_sha256"] != plain["vector_sha256"]
    found = client.get(f"/v1/adapters/{refined['adapter_id']}").json()
    assert found["recipe"] == refined["recipe"]
    stages_seen = client.get("/metrics").text
    assert 'icm_lora_generation_stage_seconds_count{stage="refine"}' in stages_seen


def test_what_is_rejected_is_not_refined(client: httpx2.Client) -> None:
    fields = {"examples": ["%&$ 17"] * 2, "refine_steps": 16, "cache": "bypass"}
    refined = 'icm_lora_generation_stage_seconds_count{stage="refine"}'
    before = [line for line in client.get("/metrics").text.splitlines() if refined in line]
    status, code, _ = refuse(client, **fields, out_of_distribution="reject")
    assert (status, code) == (422, "out_of_distribution")
    after = [line for line in client.get("/metrics").text.splitlines() if refined in line]
    assert before == after
    nearest = generate(client, **fields, out_of_distribution="nearest")
    assert (nearest["decision"], nearest["recipe"]["refine_steps"]) == ("nearest", 0)


def test_examples_unlike_any_task_are_decided_about(client: httpx2.Client) -> None:
    status, code, detail = refuse(
        client, examples=["%&$ 17"], out_of_distribution="reject", cache="bypass"
    )
    assert (status, code) == (422, "out_of_distribution"), detail
    nearest = generate(client, examples=["%&$ 17"], out_of_distribution="nearest")
    assert (nearest["decision"], nearest["recipe"]["examples"]) == ("nearest", "")


@pytest.mark.parametrize(
    ("fields", "code", "detail"),
    [
        ({"examples": []}, "invalid_request", ""),
        ({"examples": [""]}, "invalid_request", ""),
        ({"examples": ["x"] * 33}, "invalid_request", ""),
        ({"examples": ["x" * 4_001]}, "invalid_request", ""),
        ({"examples": "x"}, "invalid_request", ""),
        ({"examples": ["x"], "images": ["aGk="]}, "invalid_request", ""),
        ({"task": RECIPE, "refine_steps": 1}, "invalid_request", ""),
        ({"examples": ["x"], "refine_steps": 17}, "invalid_request", ""),
        ({"examples": ["x"], "refine_steps": 1}, "invalid_input", "too short to refine on"),
        ({"examples": ["x", " \n"]}, "invalid_input", "examples[1] is empty"),
        ({"examples": ["x"], "task": " "}, "invalid_input", "description is empty"),
        (
            {"examples": ["x"], "modality": "detection"},
            "invalid_input",
            "bundle tiny-detection has no example vectors: describe the task in words",
        ),
    ],
)
def test_wrong_examples_are_refused(
    client: httpx2.Client, fields: dict[str, Any], code: str, detail: str
) -> None:
    status, found, said = refuse(client, **fields)
    assert (status, found) == (422, code)
    assert detail in said


def test_a_service_without_example_vectors_says_so(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    plain = write_tiny_bundle(tmp_path_factory.mktemp("plain"), by_example=False)
    with serve_in_thread(make_settings(plain)) as client:
        status, code, detail = refuse(client, examples=["x"])
        assert (status, code) == (422, "invalid_input")
        assert "no bundle that is served takes example texts" in detail
        status, code, detail = refuse(client, examples=["x"], modality="text")
        assert (status, code) == (422, "invalid_input")
        assert "bundle tiny has no example vectors" in detail
