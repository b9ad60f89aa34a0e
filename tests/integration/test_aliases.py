"""Aliases over real HTTP: generations, tenants, replicas that share a real Redis, restarts."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest
from redis import Redis

from service.adapters.alias_store import KEY_PREFIX
from service.api.keys import make_key
from tests.fixtures.http_service import make_settings, serve_in_thread
from tests.fixtures.redis_server import RedisServer
from tests.fixtures.tiny_bundle import TinyBundle

RECIPE = "Write a cooking recipe."
PYTHON = "Write Python source code."
NEWS = "Write a newspaper article."
RETRY_SECONDS = 0.1


@pytest.fixture(scope="module")
def client(tiny_bundle: TinyBundle) -> Iterator[httpx2.Client]:
    with serve_in_thread(make_settings(tiny_bundle)) as running:
        yield running


def put(client: httpx2.Client, name: str, **body: Any) -> dict[str, Any]:
    response = client.put(f"/v1/aliases/{name}", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def infer(client: httpx2.Client, **fields: Any) -> dict[str, Any]:
    response = client.post("/infer", json={"prompt": "Preheat", "max_tokens": 8, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def read_problem(response: httpx2.Response) -> tuple[int, str]:
    return response.status_code, response.json()["code"]


def share(redis: RedisServer, tiny_bundle: TinyBundle, **changes: Any) -> Any:
    """Settings of a replica."""
    return make_settings(
        tiny_bundle,
        redis_url=redis.url,
        redis_timeout_seconds=2,
        redis_retry_seconds=RETRY_SECONDS,
        **changes,
    )


def test_an_alias_answers_as_its_adapter_and_says_so(client: httpx2.Client) -> None:
    made = put(client, "chef", task=RECIPE)
    assert (made["name"], made["generation"], made["expires_at"]) == ("chef", 1, None)
    assert (made["durable"], made["degraded"], made["regenerable"]) == (False, [], True)
    by_alias = infer(client, alias="chef")
    by_id = infer(client, adapter_id=made["adapter_id"])
    assert by_alias["text"] == by_id["text"]
    assert by_alias["receipt"] == by_id["receipt"]
    assert (by_alias["alias"], by_id["alias"]) == ({"name": "chef", "generation": 1}, None)
    assert client.get("/v1/aliases/chef").json() == made


def test_generations_go_on_and_conflicts_are_refused(client: httpx2.Client) -> None:
    first = put(client, "gen", task=RECIPE, expected_generation=0)
    second = put(client, "gen", task=PYTHON, expected_generation=1)
    assert (first["generation"], second["generation"]) == (1, 2)
    assert first["adapter_id"] != second["adapter_id"]
    for expected in (0, 1, 3):
        body = {"task": NEWS, "expected_generation": expected}
        response = client.put("/v1/aliases/gen", json=body)
        assert read_problem(response) == (409, "generation_conflict")
    assert client.get("/v1/aliases/gen").json()["adapter_id"] == second["adapter_id"]

    wrong = client.delete("/v1/aliases/gen", params={"expected_generation": 1})
    assert read_problem(wrong) == (409, "generation_conflict")
    gone = client.delete("/v1/aliases/gen", params={"expected_generation": 2}).json()
    assert gone == {"name": "gen", "adapter_id": second["adapter_id"], "generation": 2}
    assert read_problem(client.get("/v1/aliases/gen")) == (404, "alias_not_found")
    assert read_problem(client.delete("/v1/aliases/gen")) == (404, "alias_not_found")
    body = {"prompt": "x", "alias": "gen"}
    assert read_problem(client.post("/infer", json=body)) == (404, "alias_not_found")
    again = put(client, "gen", adapter_id=first["adapter_id"], expected_generation=0)
    assert again["generation"] == 3


def test_aliases_expire(client: httpx2.Client) -> None:
    put(client, "brief", task=RECIPE, ttl_seconds=1)
    assert client.get("/v1/aliases/brief").json()["expires_at"] is not None
    time.sleep(1.1)
    assert read_problem(client.get("/v1/aliases/brief")) == (404, "alias_not_found")
    assert "brief" not in [each["name"] for each in client.get("/v1/aliases").json()["aliases"]]
    assert put(client, "brief", task=RECIPE, expected_generation=0)["generation"] == 2


@pytest.mark.parametrize(
    "name", ["base", "0" * 64, "task%3Ax", "a b", "é", "x" * 65, "a%0A", "%00", "a:b"]
)
def test_names_that_mean_something_else_are_refused(client: httpx2.Client, name: str) -> None:
    response = client.put(f"/v1/aliases/{name}", json={"task": RECIPE})
    assert read_problem(response) == (422, "invalid_input")
    assert read_problem(client.get(f"/v1/aliases/{name}")) == (404, "alias_not_found")
    assert read_problem(client.delete(f"/v1/aliases/{name}")) == (404, "alias_not_found")


def test_what_an_alias_cannot_stand_for(client: httpx2.Client) -> None:
    cases: list[tuple[dict[str, Any], tuple[int, str]]] = [
        ({"adapter_id": "0" * 64}, (404, "adapter_not_found")),
        ({"adapter_id": "base"}, (404, "adapter_not_found")),
        ({}, (422, "invalid_request")),
        ({"task": RECIPE, "adapter_id": "0" * 64}, (422, "invalid_request")),
        ({"task": RECIPE, "modality": "detection"}, (422, "wrong_modality")),
        ({"task": RECIPE, "expected_generation": -1}, (422, "invalid_request")),
    ]
    for body, problem in cases:
        assert read_problem(client.put("/v1/aliases/never", json=body)) == problem
    assert read_problem(client.get("/v1/aliases/never")) == (404, "alias_not_found")
    lone = client.post("/infer", content=b'{"prompt": "x", "alias": "\\ud800"}',
                       headers={"content-type": "application/json"})  # fmt: skip
    assert lone.status_code in (404, 422)


def test_a_pinned_adapter_stays_though_the_cache_holds_nothing(tiny_bundle: TinyBundle) -> None:
    with serve_in_thread(make_settings(tiny_bundle, process_cache_bytes=0)) as client:
        put(client, "kept", task=RECIPE, pinned=True)
        put(client, "loose", task=PYTHON)
        assert infer(client, alias="kept")["cache"] is None
        assert infer(client, alias="loose")["cache"] == "miss"
        put(client, "kept", task=RECIPE, pinned=False)
        assert infer(client, alias="kept")["cache"] == "miss"


def test_aliases_outlive_their_adapters_deletion(tiny_bundle: TinyBundle) -> None:
    with serve_in_thread(make_settings(tiny_bundle)) as client:
        for name, pinned, cache in (("kept", True, None), ("loose", False, "miss")):
            made = put(client, name, task=RECIPE, pinned=pinned)
            assert client.delete(f"/v1/adapters/{made['adapter_id']}").status_code == 200
            answer = infer(client, alias=name)
            assert (answer["cache"], answer["receipt"]["adapter_id"]) == (cache, made["adapter_id"])


def test_requests_keep_the_adapter_that_they_resolved(client: httpx2.Client) -> None:
    tasks = (RECIPE, PYTHON)
    expected = {
        client.post("/generate-lora", json={"task": task}).json()["adapter_id"]: infer(
            client, task=task, max_tokens=24
        )["text"]
        for task in tasks
    }
    put(client, "moving", task=RECIPE)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(infer, client, alias="moving", max_tokens=24) for _ in range(12)]
        for turn in range(12):
            put(client, "moving", task=tasks[turn % 2])
        for answer in [future.result() for future in answers]:
            assert answer["text"] == expected[answer["receipt"]["adapter_id"]]


def test_tenants_do_not_see_each_other(tiny_bundle: TinyBundle, tmp_path: Path) -> None:
    scopes = ["infer", "generate"]
    (one, first), (two, second) = make_key("one", scopes), make_key("two", scopes)
    (tmp_path / "keys.json").write_text(f"[{first}, {second}]")
    settings = make_settings(tiny_bundle, api_keys_file=tmp_path / "keys.json")
    with serve_in_thread(settings) as client:

        def ask(key: str, method: str, path: str, **options: Any) -> httpx2.Response:
            headers = {"authorization": f"Bearer {key}"}
            return client.request(method, path, headers=headers, **options)

        made = ask(one, "PUT", "/v1/aliases/mine", json={"task": RECIPE}).json()
        path = f"/v1/adapters/{made['adapter_id']}"
        assert ask(one, "GET", path).status_code == 200
        for method, hidden in (
            ("GET", path),
            ("DELETE", path),
            ("GET", f"{path}/peft.zip"),
            ("GET", "/v1/aliases/mine"),
            ("DELETE", "/v1/aliases/mine"),
        ):
            seen = ask(two, method, hidden)
            absent = ask(two, method, hidden.replace(made["adapter_id"], "0" * 64))
            assert (seen.status_code, absent.status_code) == (404, 404)
            same = seen.json()["detail"].replace(made["adapter_id"], "0" * 64)
            assert same == absent.json()["detail"]
        for body in ({"adapter_id": made["adapter_id"]}, {"alias": "mine"}):
            assert ask(two, "POST", "/infer", json={"prompt": "x", **body}).status_code == 404
        steal = ask(two, "PUT", "/v1/aliases/x", json={"adapter_id": made["adapter_id"]})
        assert steal.status_code == 404
        other = ask(two, "PUT", "/v1/aliases/mine", json={"task": RECIPE}).json()
        assert other["generation"] == 1
        assert other["adapter_id"] != made["adapter_id"]
        assert ask(two, "GET", "/v1/adapters").json()["total"] == 1
        assert (
            ask(one, "GET", "/v1/aliases").json()["aliases"][0]["adapter_id"]
            == (made["adapter_id"])
        )
        assert ask(one, "GET", path).status_code == 200


@pytest.mark.redis
def test_two_replicas_agree_and_only_one_wins_a_generation(
    redis_server: RedisServer, tiny_bundle: TinyBundle
) -> None:
    with ExitStack() as stack:
        settings = share(redis_server, tiny_bundle)
        replicas = [stack.enter_context(serve_in_thread(settings)) for _ in range(2)]
        first = put(replicas[0], "shared", task=RECIPE)
        assert first["durable"] is True
        assert replicas[1].get("/v1/aliases/shared").json() == first
        assert infer(replicas[1], alias="shared")["alias"]["generation"] == 1

        for generation in range(1, 6):
            with ThreadPoolExecutor(8) as pool:
                body = {"task": PYTHON, "expected_generation": generation}
                answers = list(
                    pool.map(
                        lambda i, body=body: replicas[i % 2].put("/v1/aliases/shared", json=body),
                        range(8),
                    )
                )
            assert sorted(answer.status_code for answer in answers) == [200] + [409] * 7
        with ThreadPoolExecutor(8) as pool:
            body = {"task": NEWS}
            racing = list(pool.map(lambda i: put(replicas[i % 2], "shared", task=NEWS), range(16)))
        assert sorted(answer["generation"] for answer in racing) == list(range(7, 23))
        assert replicas[1].delete("/v1/aliases/shared").status_code == 200
        assert replicas[0].get("/v1/aliases/shared").status_code == 404
        assert put(replicas[0], "shared", task=RECIPE)["generation"] == 23


@pytest.mark.redis
def test_a_restart_rebuilds_what_there_was(
    redis_server: RedisServer, tiny_bundle: TinyBundle
) -> None:
    settings = share(redis_server, tiny_bundle)
    with serve_in_thread(settings) as client:
        put(client, "gone", task=NEWS)
        client.delete("/v1/aliases/gone")
        made = [
            put(client, "pinned", task=RECIPE, pinned=True),
            put(client, "loose", task=PYTHON, ttl_seconds=600),
        ]
        before = {each["name"]: infer(client, alias=each["name"]) for each in made}
    with Redis.from_url(redis_server.url) as inspector:
        records = list(inspector.scan_iter(match="icm-lora:adapter:*"))
        assert records
        inspector.delete(*records)
    with serve_in_thread(settings) as client:
        found = client.get("/v1/aliases").json()
        assert [each["name"] for each in found["aliases"]] == ["loose", "pinned"]
        deadline = time.monotonic() + 20
        while client.get("/v1/adapters").json()["total"] == 0:  # the pinned one comes by itself
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for each in made:
            after = infer(client, alias=each["name"])
            old, new = before[each["name"]]["receipt"], after["receipt"]
            assert new["vector_sha256"] == old["vector_sha256"]
            assert new["adapter_id"] == each["adapter_id"]
            assert after["text"] == before[each["name"]]["text"]
        assert after["cache"] == "miss"
        assert put(client, "gone", task=NEWS)["generation"] == 2


@pytest.mark.redis
def test_a_start_without_redis_is_declared_and_made_up_for(
    redis_server: RedisServer, tiny_bundle: TinyBundle, caplog: pytest.LogCaptureFixture
) -> None:
    settings = share(redis_server, tiny_bundle)
    with serve_in_thread(settings) as client:
        made = put(client, "pinned", task=RECIPE, pinned=True)
        assert client.get("/health/ready").json()["degraded"] == []
    redis_server.pause()
    hasty = settings.model_copy(update={"redis_timeout_seconds": 0.2})
    with serve_in_thread(hasty) as client:
        deadline = time.monotonic() + 20

        def read() -> tuple[list[str], bool]:
            lines = client.get("/metrics").text.splitlines()
            told = 'icm_lora_degraded{component="aliases"} 1.0' in lines
            return client.get("/health/ready").json()["degraded"], told

        while read() != (["redis", "aliases"], True):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert "aliases were not restored" in caplog.text
        assert client.get("/v1/adapters").json()["total"] == 0
        redis_server.resume()
        while read() != ([], False) or not client.get("/v1/adapters").json()["total"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        answer = infer(client, alias="pinned")
        assert (answer["cache"], answer["receipt"]["adapter_id"]) == (None, made["adapter_id"])


@pytest.mark.redis
def test_without_redis_aliases_are_read_and_not_changed(
    redis_server: RedisServer, tiny_bundle: TinyBundle
) -> None:
    with serve_in_thread(share(redis_server, tiny_bundle)) as client:
        made = put(client, "steady", task=RECIPE)
        redis_server.stop()
        answer = infer(client, alias="steady")
        assert answer["receipt"]["adapter_id"] == made["adapter_id"]
        assert answer["degraded"] == ["redis"]
        assert client.get("/v1/aliases/steady").json()["degraded"] == ["redis"]
        assert client.get("/v1/aliases").json()["degraded"] == ["redis"]
        assert client.get("/health/ready").status_code == 200
        for response in (
            client.put("/v1/aliases/steady", json={"task": PYTHON}),
            client.delete("/v1/aliases/steady"),
        ):
            assert read_problem(response) == (503, "registry_unavailable")
            assert response.headers["retry-after"] == "2"
        assert client.get("/v1/aliases/steady").json()["generation"] == 1
        redis_server.start()  # empty: it has lost the alias, which this process gives back
        deadline = time.monotonic() + 10
        while client.get("/v1/aliases/steady").json()["degraded"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with Redis.from_url(redis_server.url) as inspector:
            assert inspector.hexists(f"{KEY_PREFIX}public", "steady")
        assert put(client, "steady", task=PYTHON)["generation"] == 2


@pytest.mark.redis
def test_forged_aliases_are_not_used(redis_server: RedisServer, tiny_bundle: TinyBundle) -> None:
    key = f"{KEY_PREFIX}public"
    settings = share(redis_server, tiny_bundle)
    with Redis.from_url(redis_server.url) as inspector, serve_in_thread(settings) as client:
        made = put(client, "real", task=RECIPE)
        put(client, "other", task=PYTHON)
        genuine = inspector.hget(key, "real")
        for forged in (b"", b"x", inspector.hget(key, "other"), genuine[:-1], genuine + b" "):
            inspector.hset(key, "real", forged)
            inspector.hset(key, "invented", forged)
            assert infer(client, alias="real")["receipt"]["adapter_id"] == made["adapter_id"]
            assert inspector.hget(key, "real") == genuine  # given back by who knew it
            assert client.get("/v1/aliases/invented").status_code == 404
            assert not inspector.hget(key, "invented")
        inspector.set(key, "no hash")
        assert infer(client, alias="real")["degraded"] == []
        listed = client.get("/v1/aliases").json()
        assert ([each["name"] for each in listed["aliases"]]) == ["other", "real"]


def test_pins_of_a_tenant_leave_room_for_the_others(
    tiny_bundle: TinyBundle, tmp_path: Path
) -> None:
    size = 2 * tiny_bundle.bundle.layout.num_params
    made = {tenant: make_key(tenant, ["generate"]) for tenant in ("one", "two", "three")}
    entries = [json.loads(entry) for _, entry in made.values()]
    entries[1]["limits"] = {"pinned_bytes": 2 * size}
    (tmp_path / "keys.json").write_text(json.dumps(entries))
    settings = make_settings(
        tiny_bundle,
        api_keys_file=tmp_path / "keys.json",
        pinned_bytes=3 * size,
        tenant_pinned_bytes=size,
    )
    with serve_in_thread(settings) as client:

        def pin(tenant: str, name: str, task: str) -> int:
            headers = {"authorization": f"Bearer {made[tenant][0]}"}
            body = {"task": task, "pinned": True}
            return client.put(f"/v1/aliases/{name}", json=body, headers=headers).status_code

        assert [pin("one", "a", RECIPE), pin("one", "b", PYTHON)] == [200, 429]
        assert pin("one", "a", NEWS) == 200  # in place of itself
        assert [pin("two", name, RECIPE) for name in "abc"] == [200, 200, 429]
        assert pin("three", "a", RECIPE) == 429  # the process is full


def test_pins_have_room_of_their_own_and_no_more(
    client: httpx2.Client, tiny_bundle: TinyBundle
) -> None:
    size = client.post("/generate-lora", json={"task": RECIPE}).json()["size_bytes"]
    with serve_in_thread(make_settings(tiny_bundle, pinned_bytes=size)) as full:
        put(full, "first", task=RECIPE, pinned=True)
        put(full, "first", task=PYTHON, pinned=True)  # in place of itself
        refused = full.put("/v1/aliases/second", json={"task": NEWS, "pinned": True})
        assert read_problem(refused) == (429, "quota_exceeded")
        assert "retry-after" in refused.headers
        assert full.get("/v1/aliases/second").status_code == 404
        full.delete("/v1/aliases/first")
        put(full, "second", task=NEWS, pinned=True)
