"""vLLM's load and unload routes over real HTTP: off by default, no paths, vLLM's answers."""

import base64
import io
import zipfile
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from service.adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE
from tests.fixtures.http_service import make_settings, serve_in_thread
from tests.fixtures.tiny_bundle import TinyBundle

RECIPE = "Write a cooking recipe."
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def client(tiny_bundle: TinyBundle) -> Iterator[httpx2.Client]:
    with serve_in_thread(make_settings(tiny_bundle, runtime_lora_updating=True)) as running:
        yield running


def read_error(response: httpx2.Response) -> tuple[int, dict[str, Any]]:
    error: dict[str, Any] = response.json()["error"]
    return response.status_code, error


def test_the_routes_are_off_by_default(tiny_bundle: TinyBundle) -> None:
    with serve_in_thread(make_settings(tiny_bundle)) as client:
        for path in (LOAD, UNLOAD):
            assert client.post(path, json={"lora_name": "x"}).status_code == 404
            assert path not in client.get("/openapi.json").json()["paths"]


def test_loading_and_unloading_as_with_vllm(client: httpx2.Client) -> None:
    body = {"lora_name": "chef", "task": RECIPE}
    loaded = client.post(LOAD, json=body)
    assert loaded.status_code == 200
    assert loaded.text == "Success: LoRA adapter 'chef' added successfully."
    assert loaded.headers["content-type"].startswith("text/plain")
    assert client.get("/v1/aliases/chef").json()["pinned"] is True
    completion = client.post(
        "/v1/completions", json={"model": "chef", "prompt": "Preheat", "max_tokens": 8}
    )
    assert completion.status_code == 200

    status, error = read_error(client.post(LOAD, json=body))
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert error["message"].startswith("The lora adapter 'chef' has already been loaded.")
    assert client.post(LOAD, json={**body, "load_inplace": True}).status_code == 200
    documented = client.get("/openapi.json").json()["paths"][LOAD]["post"]["responses"]["400"]
    assert "out_of_distribution" in documented["content"]["application/json"]["examples"]
    assert client.get("/v1/aliases/chef").json()["generation"] == 2

    unloaded = client.post(UNLOAD, json={"lora_name": "chef", "lora_int_id": 1})
    assert unloaded.text == "Success: LoRA adapter 'chef' removed successfully."
    status, error = read_error(client.post(UNLOAD, json={"lora_name": "chef"}))
    assert (status, error["message"]) == (404, "The lora adapter 'chef' cannot be found.")


def test_files_and_ids_are_taken_and_paths_are_not(client: httpx2.Client) -> None:
    adapter = client.post("/generate-lora", json={"task": RECIPE}).json()
    by_id = {"lora_name": "by-id", "adapter_id": adapter["adapter_id"]}
    assert client.post(LOAD, json=by_id).status_code == 200
    content = client.get(f"/v1/adapters/{adapter['adapter_id']}/peft.zip").content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        files = {
            field: base64.b64encode(archive.read(name)).decode()
            for field, name in (("config", CONFIG_FILE), ("weights", WEIGHTS_FILE))
        }
    assert client.post(LOAD, json={"lora_name": "files", **files}).status_code == 200
    texts = {
        client.post("/infer", json={"alias": name, "prompt": "Preheat"}).json()["text"]
        for name in ("by-id", "files")
    }
    assert len(texts) == 1

    for path in ("/etc", "org/repository", ""):
        status, error = read_error(client.post(LOAD, json={"lora_name": "path", "lora_path": path}))
        assert (status, error["param"]) == (400, "lora_path")
    for body in (
        {"lora_name": "x"},
        {"task": RECIPE},
        {"lora_name": "x", "config": files["config"]},
        {"lora_name": "base", "task": RECIPE},
        {"lora_name": "x", "task": RECIPE, "adapter_id": adapter["adapter_id"]},
        {"lora_name": "x", "unknown": 1},
    ):
        assert read_error(client.post(LOAD, json=body))[0] == 400
    missing = {"lora_name": "x", "adapter_id": "0" * 64}
    assert read_error(client.post(LOAD, json=missing))[0] == 404
