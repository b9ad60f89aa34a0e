"""Policies for tasks unlike all training tasks, over HTTP; never silent."""

import re
from collections.abc import Iterator

import httpx2
import pytest

from service.synthesis.novelty import THRESHOLD
from tests.fixtures.http_service import make_both_settings, serve_in_thread
from tests.fixtures.tiny_bundle import TINY_TASKS, TinyBundle
from tests.fixtures.tiny_detection_bundle import TinyDetectionBundle

NEAR = TINY_TASKS[0].descriptions[0]
FAR = "zzzz 1234567890"


@pytest.fixture(scope="module")
def client(
    tiny_bundle: TinyBundle, tiny_detection_bundle: TinyDetectionBundle
) -> Iterator[httpx2.Client]:
    settings = make_both_settings(tiny_bundle, tiny_detection_bundle, out_of_distribution="reject")
    assert tiny_bundle.synthesizer.score(FAR) < THRESHOLD
    with serve_in_thread(settings) as client:
        yield client


def infer(client: httpx2.Client, task: str, policy: str | None = None) -> httpx2.Response:
    body = {"task": task, "prompt": "Hello", "max_tokens": 4}
    return client.post("/infer", json=body | ({"out_of_distribution": policy} if policy else {}))


def generate(client: httpx2.Client, task: str, policy: str | None = None) -> httpx2.Response:
    body = {"task": task, "modality": "text"}
    return client.post(
        "/generate-lora", json=body | ({"out_of_distribution": policy} if policy else {})
    )


def test_a_training_wording_is_in_distribution(client: httpx2.Client) -> None:
    receipt = infer(client, NEAR).json()["receipt"]
    assert receipt["decision"] == "in_distribution"
    assert receipt["nearest_task"] == TINY_TASKS[0].name
    assert receipt["similarity"] > 0.99
    assert receipt["in_distribution"] >= receipt["threshold"] == THRESHOLD
    body = generate(client, NEAR).json()
    assert body["decision"] == "in_distribution"
    assert body["similarity"] > 0.99
    assert body["in_distribution"] >= body["threshold"] == THRESHOLD
    named = client.post(
        "/infer", json={"adapter_id": body["adapter_id"], "prompt": "Hello", "max_tokens": 1}
    ).json()["receipt"]
    assert named["decision"] is None


def test_the_default_rejects_and_names_the_nearest_tasks(client: httpx2.Client) -> None:
    for answer in (infer(client, FAR), generate(client, FAR), generate(client, FAR, "base")):
        assert answer.status_code == 422
        problem = answer.json()
        assert problem["code"] == "out_of_distribution"
        assert any(task.name in problem["detail"] for task in TINY_TASKS)


def test_what_is_rejected_is_not_kept(client: httpx2.Client) -> None:
    words = f"{FAR} 0987654321"
    before = client.get("/v1/adapters").json()["total"]
    for answer in (infer(client, words), generate(client, words), infer(client, words)):
        assert answer.json()["code"] == "out_of_distribution"
    assert client.get("/v1/adapters").json()["total"] == before
    body = {"task": words, "modality": "text", "cache": "only"}
    assert client.post("/generate-lora", json=body).json()["code"] == "not_cached"
    assert generate(client, words, "generate").json()["cache"] == "miss"
    assert generate(client, words).json()["code"] == "out_of_distribution"  # kept or not


def test_nearest_answers_with_the_nearest_tasks_adapter(client: httpx2.Client) -> None:
    receipt = infer(client, FAR, "nearest").json()["receipt"]
    assert receipt["decision"] == "nearest"
    task = next(each for each in TINY_TASKS if each.name == receipt["nearest_task"])
    own = generate(client, task.descriptions[0]).json()
    assert receipt["adapter_id"] == own["adapter_id"]
    assert receipt["vector_sha256"] == own["vector_sha256"]
    generated = generate(client, FAR, "nearest").json()
    assert (generated["decision"], generated["adapter_id"]) == ("nearest", own["adapter_id"])
    assert generated["similarity"] < 0.9


def test_base_answers_with_the_base(client: httpx2.Client) -> None:
    answer = infer(client, FAR, "base").json()
    own = client.post(
        "/infer", json={"adapter_id": "base", "prompt": "Hello", "max_tokens": 4}
    ).json()
    assert (answer["receipt"]["decision"], answer["receipt"]["adapter_id"]) == ("base", "base")
    assert answer["text"] == own["text"]
    assert own["receipt"]["decision"] is None
    assert infer(client, NEAR, "base").json()["receipt"]["decision"] == "in_distribution"


def test_generate_uses_it_anyway(client: httpx2.Client) -> None:
    receipt = infer(client, FAR, "generate").json()["receipt"]
    assert receipt["decision"] == "generated_out_of_distribution"
    body = generate(client, FAR, "generate").json()
    assert (body["decision"], body["adapter_id"]) == (receipt["decision"], receipt["adapter_id"])


def test_openai_routes_take_the_policy_too(client: httpx2.Client) -> None:
    body = {"model": f"task:{FAR}", "prompt": "Hello", "max_tokens": 2}
    refused = client.post("/v1/completions", json=body)
    assert refused.status_code == 422 or refused.status_code == 400
    assert refused.json()["error"]["code"] == "out_of_distribution"
    served = client.post("/v1/completions", json=body | {"out_of_distribution": "base"})
    assert served.json()["icm_lora"]["decision"] == "base"


def test_unknown_policies_are_errors_and_decisions_are_counted(client: httpx2.Client) -> None:
    assert infer(client, FAR, "guess").status_code == 422
    text = client.get("/metrics").text
    counted = set(re.findall(r'icm_lora_decisions_total\{decision="(\w+)"\} [1-9]', text))
    assert {"reject", "nearest", "base", "generated_out_of_distribution"} <= counted
