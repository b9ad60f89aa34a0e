"""Adapters that were trained elsewhere, over real HTTP: what comes back is what was sent."""

import base64
import io
import json
import time
import zipfile
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import safetensors.torch
import torch
from redis import Redis

from service.adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE
from tests.fixtures.http_service import make_settings, serve_in_thread
from tests.fixtures.redis_server import RedisServer
from tests.fixtures.tiny_bundle import TinyBundle

RECIPE = "Write a cooking recipe."
PYTHON = "Write Python source code."


@pytest.fixture(scope="module")
def client(tiny_bundle: TinyBundle) -> Iterator[httpx2.Client]:
    with serve_in_thread(make_settings(tiny_bundle, max_adapter_bytes=400_000)) as running:
        yield running


def export(client: httpx2.Client, task: str = RECIPE) -> tuple[dict[str, Any], bytes, bytes]:
    adapter = client.post("/generate-lora", json={"task": task}).json()
    content = client.get(f"/v1/adapters/{adapter['adapter_id']}/peft.zip").content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return adapter, archive.read(CONFIG_FILE), archive.read(WEIGHTS_FILE)


def upload(client: httpx2.Client, config: bytes, weights: bytes, **fields: Any) -> httpx2.Response:
    files = {name: base64.b64encode(data).decode() for name, data in
             (("config", config), ("weights", weights))}  # fmt: skip
    return client.post("/v1/adapters", json={**files, **fields})


def infer(client: httpx2.Client, **fields: Any) -> dict[str, Any]:
    response = client.post("/infer", json={"prompt": "Preheat", "max_tokens": 24, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def read_problem(response: httpx2.Response) -> tuple[int, str]:
    return response.status_code, response.json()["code"]


def test_our_own_export_comes_back_and_answers_the_same(client: httpx2.Client) -> None:
    adapter, config, weights = export(client)
    sent = upload(client, config, weights)
    assert sent.status_code == 200, sent.text
    uploaded = sent.json()
    assert uploaded["vector_sha256"] == adapter["vector_sha256"]
    assert uploaded["adapter_id"] != adapter["adapter_id"]
    assert (uploaded["recipe"], uploaded["regenerable"]) == (None, False)
    assert (uploaded["nearest"], uploaded["in_distribution"]) == ([], None)
    assert adapter["regenerable"] is True
    form = client.post("/v1/adapters", files={"config": config, "weights": weights})
    assert form.json() == uploaded
    assert client.get(f"/v1/adapters/{uploaded['adapter_id']}").json() == {
        key: value for key, value in uploaded.items() if key != "degraded"
    }
    ours = infer(client, adapter_id=adapter["adapter_id"])
    theirs = infer(client, adapter_id=uploaded["adapter_id"])
    assert theirs["text"] == ours["text"] != infer(client, adapter_id="base")["text"]
    assert theirs["receipt"]["adapter_id"] == uploaded["adapter_id"]

    named = client.put("/v1/aliases/theirs", json={"adapter_id": uploaded["adapter_id"]}).json()
    assert named["regenerable"] is False
    assert infer(client, alias="theirs")["text"] == ours["text"]
    assert client.delete(f"/v1/adapters/{uploaded['adapter_id']}").status_code == 200
    body = {"prompt": "x", "alias": "theirs"}
    assert read_problem(client.post("/infer", json=body)) == (404, "adapter_not_found")


def test_what_does_not_fit_is_refused(client: httpx2.Client) -> None:
    _, config, weights = export(client)
    tensors = safetensors.torch.load(weights)
    random = {name: torch.randn_like(tensor) for name, tensor in tensors.items()}
    outside = upload(client, config, safetensors.torch.save(random))
    assert read_problem(outside) == (422, "invalid_adapter")
    assert "of the update lies outside" in outside.json()["detail"]
    loud = {name: tensor * (1e3 if "lora_A" in name else 1) for name, tensor in tensors.items()}
    dora = json.dumps(json.loads(config) | {"use_dora": True}).encode()
    for files in ((config, safetensors.torch.save(loud)), (dora, weights), (config, b"\x80\x04.")):
        assert read_problem(upload(client, *files)) == (422, "invalid_adapter")
    not_base64 = client.post("/v1/adapters", json={"config": "%", "weights": "%"})
    assert read_problem(not_base64) == (422, "invalid_input")
    modality = upload(client, config, weights, modality="detection")
    assert read_problem(modality) == (422, "wrong_modality")
    for body in ({}, {"config": ""}, {"path": "/etc/passwd"}):
        response = client.post("/v1/adapters", json=body)
        assert read_problem(response) == (422, "invalid_request")
    large = upload(client, config, b"\0" * 400_000)
    assert read_problem(large) == (413, "body_too_large")


@pytest.mark.redis
def test_an_alias_keeps_an_upload_over_a_restart(
    redis_server: RedisServer, tiny_bundle: TinyBundle
) -> None:
    settings = make_settings(
        tiny_bundle, redis_url=redis_server.url, redis_timeout_seconds=2, redis_secret="s" * 32
    )
    with serve_in_thread(settings) as client:
        _, config, weights = export(client)
        kept, lost = (
            upload(client, config, weights, ttl_seconds=1).json(),
            upload(client, *export(client, PYTHON)[1:], ttl_seconds=1).json(),
        )
        client.put("/v1/aliases/kept", json={"adapter_id": kept["adapter_id"]})
        text = infer(client, alias="kept")["text"]
    time.sleep(1.1)
    with serve_in_thread(settings) as client:
        answer = infer(client, alias="kept")
        assert answer["text"] == text
        assert answer["receipt"]["vector_sha256"] == kept["vector_sha256"]
        gone = client.get(f"/v1/adapters/{lost['adapter_id']}")
        assert read_problem(gone) == (404, "adapter_not_found")
    with Redis.from_url(redis_server.url) as inspector:
        (key,) = inspector.scan_iter(match=f"*{kept['adapter_id']}")
        inspector.set(key, inspector.get(key)[:-1] + b"x")  # forged: no recipe to fall back on
    with serve_in_thread(settings) as client:
        body = {"prompt": "x", "alias": "kept"}
        assert read_problem(client.post("/infer", json=body)) == (404, "adapter_not_found")
