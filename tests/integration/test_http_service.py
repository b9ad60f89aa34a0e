"""The whole service over real HTTP: uvicorn, a tiny bundle and a tiny base model."""

import io
import json
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from service.adapters.slot_bank import SlotBank
from service.api.middleware import CLIENT_CLOSED_REQUEST
from service.synthesis.adapter_recipe import AdapterRecipe
from tests.fixtures.http_service import make_settings, serve_in_thread
from tests.fixtures.tiny_bundle import TinyBundle

RECIPE = "Write a cooking recipe."
PYTHON = "Write Python source code."
UNKNOWN = "0" * 64

Labels = tuple[tuple[str, str], ...]

UNDECIDED = dict.fromkeys(
    ("decision", "nearest_task", "in_distribution", "similarity", "threshold")
)
"""In a receipt where the request named its adapter."""


@pytest.fixture(scope="module")
def client(tiny_bundle: TinyBundle) -> Iterator[httpx2.Client]:
    with serve_in_thread(make_settings(tiny_bundle)) as running:
        yield running


def generate(client: httpx2.Client, task: str = RECIPE, **fields: Any) -> dict[str, Any]:
    response = client.post("/generate-lora", json={"task": task, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def infer(client: httpx2.Client, **fields: Any) -> dict[str, Any]:
    response = client.post("/infer", json={"prompt": "Preheat", "max_tokens": 16, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def read_metrics(client: httpx2.Client) -> dict[tuple[str, Labels], float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_health(client: httpx2.Client) -> None:
    assert client.get("/health/live").json() == {"status": "live"}
    assert client.get("/health/ready").json() == {"status": "ready", "degraded": []}


def test_generated_adapter_has_the_synthesizers_bytes_and_its_facts(
    client: httpx2.Client, tiny_bundle: TinyBundle
) -> None:
    bundle, layout = tiny_bundle.bundle, tiny_bundle.bundle.layout
    recipe = AdapterRecipe.build(task=RECIPE, bundle_digest=bundle.digest)
    expected = tiny_bundle.synthesizer.synthesize(recipe)
    answer = generate(client, cache="bypass")
    assert answer["adapter_id"] == expected.adapter_id
    assert answer["vector_sha256"] == expected.vector_sha256
    assert answer["bundle"] == {"name": "tiny", "version": "0.0.1", "digest": bundle.digest}
    assert (answer["kind"], answer["rank"], answer["alpha"]) == ("core", 4, 4.0)
    assert answer["target_modules"] == ["q_proj", "v_proj"]
    assert answer["num_params"] == layout.num_params
    assert answer["size_bytes"] == 2 * layout.num_params
    assert answer["nearest"][0]["name"] == "recipes"
    assert answer["in_distribution"] == expected.in_distribution
    assert answer["degraded"] == []
    assert answer["slot"] >= 1
    stages = {"encode", "decode", "cache_write", "write_slot", "total"}
    assert stages <= set(answer["milliseconds"])
    assert answer["milliseconds"]["total"] >= answer["milliseconds"]["encode"] > 0


def test_cache_policies(client: httpx2.Client) -> None:
    task = "Describe the cache of a processor."
    only = client.post("/generate-lora", json={"task": task, "cache": "only"})
    assert (only.status_code, only.json()["code"]) == (404, "not_cached")
    first = generate(client, task, ttl_seconds=60)
    again = generate(client, f"  {task.replace(' ', '   ')} ", seed=5)  # the same recipe
    assert (first["cache"], again["cache"]) == ("miss", "hit")
    assert generate(client, task, cache="only")["cache"] == "hit"
    assert generate(client, task, cache="bypass")["cache"] == "bypass"
    stable = ("adapter_id", "vector_sha256", "slot", "generation")
    assert {key: first[key] for key in stable} == {key: again[key] for key in stable}


def test_samples_differ_by_seed_and_repeat(client: httpx2.Client) -> None:
    drawn = [generate(client, mode="sample", seed=seed, cache="bypass") for seed in (1, 2, 1)]
    hashes = [answer["vector_sha256"] for answer in drawn]
    assert hashes[0] == hashes[2] != hashes[1]


def test_identical_concurrent_requests_share_one_synthesis(client: httpx2.Client) -> None:
    task = "Write something for many readers at once."
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: generate(client, task), range(8)))
    outcomes = [answer["cache"] for answer in answers]
    assert outcomes.count("miss") == 1
    assert set(outcomes) <= {"miss", "coalesced", "hit"}
    assert len({answer["vector_sha256"] for answer in answers}) == 1


def test_adapter_answers_with_a_receipt_and_differs_from_the_base(client: httpx2.Client) -> None:
    adapter = generate(client, strength=4)
    tuned = infer(client, adapter_id=adapter["adapter_id"])
    base = infer(client, adapter_id="base")
    assert (
        tuned["receipt"]
        == {
            key: adapter[key]
            for key in ("adapter_id", "vector_sha256", "slot", "generation", "bundle")
        }
        | UNDECIDED
    )
    assert (
        base["receipt"]
        == {
            "adapter_id": "base",
            "vector_sha256": None,
            "slot": 0,
            "generation": 0,
            "bundle": adapter["bundle"],
        }
        | UNDECIDED
    )
    assert tuned["text"] != base["text"]
    usage = tuned["usage"]
    assert usage["prompt_tokens"] == len("Preheat")
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert (tuned["cache"], tuned["degraded"]) == (None, [])
    assert {"queue", "prefill", "decode", "total"} <= set(tuned["milliseconds"])


def test_task_generates_then_answers(client: httpx2.Client) -> None:
    adapter = generate(client, PYTHON)
    answer = infer(client, task=PYTHON)
    assert answer["cache"] == "hit"
    assert answer["receipt"]["adapter_id"] == adapter["adapter_id"]
    assert answer["text"] == infer(client, adapter_id=adapter["adapter_id"])["text"]


@pytest.mark.parametrize("adapter_id", [UNKNOWN, "BASE", "base ", "nonsense"])
def test_unknown_adapter_is_never_answered_by_the_base(
    client: httpx2.Client, adapter_id: str
) -> None:
    response = client.post("/infer", json={"prompt": "x", "adapter_id": adapter_id})
    assert (response.status_code, response.json()["code"]) == (404, "adapter_not_found")


def test_concurrent_requests_of_many_adapters_answer_as_they_do_alone(
    client: httpx2.Client,
) -> None:
    sources: list[dict[str, Any]] = [{"adapter_id": "base"}, {"task": RECIPE}, {"task": PYTHON}]
    requests = [
        {**source, "prompt": prompt, "max_tokens": 24, "seed": 3, "temperature": temperature}
        for source in sources
        for prompt in ("a", "Once upon a time")
        for temperature in (0.0, 0.9)
    ]
    alone = [infer(client, **request)["text"] for request in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(lambda request: infer(client, **request)["text"], requests))
    assert together == alone


def test_stop_text_ends_the_completion(client: httpx2.Client) -> None:
    text = infer(client, adapter_id="base")["text"]
    stop = next(letter for letter in text if letter.isascii())
    answer = infer(client, adapter_id="base", stop=[stop])
    assert answer["finish_reason"] == "stop"
    assert answer["text"] == text[: text.index(stop)]


def test_adapters_are_listed_read_downloaded_and_deleted(client: httpx2.Client) -> None:
    adapter = generate(client, "Write a letter to a friend.")
    path = f"/v1/adapters/{adapter['adapter_id']}"
    info = client.get(path).json()
    assert info == {key: adapter[key] for key in info}
    assert info["recipe"]["task"] == "Write a letter to a friend."

    listed = client.get("/v1/adapters", params={"limit": 1}).json()
    assert listed["adapters"] == [info]  # the most recently used comes first
    assert listed["total"] >= 1
    beyond = client.get("/v1/adapters", params={"offset": listed["total"]}).json()
    assert beyond["adapters"] == []

    download = client.get(f"{path}/peft.zip")
    assert download.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(download.content)) as archive:
        config = json.loads(archive.read("adapter_config.json"))
        assert "adapter_model.safetensors" in archive.namelist()
    assert (config["peft_type"], config["r"]) == ("LORA", 4)
    assert client.get(f"{path}/peft.zip").content == download.content

    deleted = client.delete(path)
    assert deleted.json() == {"adapter_id": adapter["adapter_id"], "degraded": []}
    for gone in (client.get(path), client.delete(path), client.get(f"{path}/peft.zip")):
        assert (gone.status_code, gone.json()["code"]) == (404, "adapter_not_found")
    body = {"prompt": "x", "adapter_id": adapter["adapter_id"]}
    assert client.post("/infer", json=body).status_code == 404
    assert generate(client, "Write a letter to a friend.")["generation"] > adapter["generation"]


def test_wrong_fields_are_refused_by_name(client: httpx2.Client) -> None:
    body = json.dumps({"task": "\ud800", "seed": -1, "mood": 1})  # a lone surrogate, escaped
    response = client.post(
        "/generate-lora", content=body, headers={"content-type": "application/json"}
    )
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
    locations = {error["location"] for error in response.json()["errors"]}
    assert locations == {"body.task", "body.seed", "body.mood"}


def test_prompt_over_the_token_limit_is_refused(client: httpx2.Client) -> None:
    response = client.post("/infer", json={"adapter_id": "base", "prompt": "x" * 5000})
    assert (response.status_code, response.json()["code"]) == (422, "invalid_input")


def test_body_over_the_limit_is_refused(client: httpx2.Client) -> None:
    response = client.post("/generate-lora", json={"task": "x" * 13_000_000})
    assert (response.status_code, response.json()["code"]) == (413, "body_too_large")


def test_metrics_count_what_happened_with_bounded_labels(client: httpx2.Client) -> None:
    before = read_metrics(client)
    adapter = generate(client, "Write down what you measured.")
    answer = infer(client, adapter_id=adapter["adapter_id"])
    client.get(f"/v1/adapters/{adapter['adapter_id']}")
    after = read_metrics(client)

    def grown(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return after[key] - before.get(key, 0.0)

    request = {"method": "POST", "status": "200"}
    assert grown("icm_lora_http_requests_total", route="/generate-lora", **request) == 1
    assert grown("icm_lora_http_request_seconds_count", route="/infer") == 1
    for stage in ("encode", "decode", "cache_write", "write_slot"):
        assert grown("icm_lora_generation_stage_seconds_count", stage=stage) == 1
    assert grown("icm_lora_cache_lookups_total", tier="process", result="miss") == 1
    assert grown("icm_lora_cache_lookups_total", tier="process", result="hit") == 2
    assert grown("icm_lora_adapters_generated_total", cache="miss") == 1
    assert grown("icm_lora_generated_tokens_total") == answer["usage"]["completion_tokens"]
    steps = grown("icm_lora_batch_rows_count", modality="text")
    assert 1 <= steps <= answer["usage"]["completion_tokens"]
    assert after["icm_lora_slots", (("modality", "text"), ("state", "total"))] == 8
    assert after["icm_lora_slots", (("modality", "text"), ("state", "resident"))] >= 1
    assert after["icm_lora_slots", (("modality", "text"), ("state", "leased"))] == 0
    assert after["icm_lora_queue_depth", (("modality", "text"),)] == 0
    assert not any(adapter["adapter_id"] in str(key) for key in after)
    assert any(name == "icm_lora_build_info" for name, _ in after)


def test_client_that_goes_away_frees_its_place(client: httpx2.Client) -> None:
    body = {"adapter_id": "base", "prompt": "x", "max_tokens": 500}
    gone = ("method", "POST"), ("route", "/infer"), ("status", str(CLIENT_CLOSED_REQUEST))
    with pytest.raises(httpx2.ReadTimeout):
        client.post("/infer", json=body, timeout=0.05)
    deadline = time.monotonic() + 30
    while read_metrics(client).get(("icm_lora_http_requests_total", gone)) != 1:
        assert time.monotonic() < deadline, "the request was not given up"
        time.sleep(0.02)
    assert infer(client, adapter_id="base")["milliseconds"]["queue"] < 1000


def test_every_answer_is_documented(client: httpx2.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    documented = {
        (route, method.upper(), status)
        for route, operations in paths.items()
        for method, operation in operations.items()
        for status in operation["responses"]
    }
    answered = {
        (labels["route"], labels["method"], labels["status"])
        for labels in (
            dict(key[1]) for key in read_metrics(client) if key[0].endswith("_requests_total")
        )
    }  # by all tests above, too
    assert ("/generate-lora", "POST", "200") in answered
    undocumented = {
        ("/openapi.json", "GET", "200"),
        ("/infer", "POST", str(CLIENT_CLOSED_REQUEST)),  # never sent: nobody is left to read it
    }
    assert answered - documented <= undocumented


def test_an_adapter_that_finds_no_slot_is_loaded_by_its_first_request(
    tiny_bundle: TinyBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    banks: list[SlotBank] = []

    class KnownBank(SlotBank):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            banks.append(self)

    monkeypatch.setattr("service.inference.engine.SlotBank", KnownBank)
    with serve_in_thread(make_settings(tiny_bundle, num_slots=1)) as client:
        (bank,) = banks
        vector = torch.zeros(tiny_bundle.bundle.layout.num_params)
        with bank.acquire("running", vector):
            adapter = generate(client)
        assert (adapter["slot"], adapter["generation"]) == (None, None)
        assert "write_slot" not in adapter["milliseconds"]
        answer = infer(client, adapter_id=adapter["adapter_id"])
        assert (answer["receipt"]["slot"], answer["receipt"]["generation"]) == (1, 2)
        assert generate(client)["slot"] == 1


def test_overload_is_refused_with_a_time_to_retry(tiny_bundle: TinyBundle) -> None:
    settings = make_settings(tiny_bundle, max_queue=1, max_batch_rows=1)
    with serve_in_thread(settings) as client:
        body = {"adapter_id": "base", "prompt": "x", "max_tokens": 100}
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: client.post("/infer", json=body), range(8)))
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 429}
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.json()["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) >= 1
        key = ("icm_lora_rejections_total", (("reason", "queue_full"),))
        assert read_metrics(client)[key] == statuses.count(429)
