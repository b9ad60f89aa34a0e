"""Nobody gets in without a key, and a key opens only what its scopes allow: over real HTTP."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from service.api.app import create_app
from service.api.auth import OPEN_PATHS, GuardedRoute, Scope, check_routes, needs
from service.api.keys import KEY_PREFIX, hash_key, make_key, read_keys
from service.errors import InvalidInputError
from tests.fixtures.http_service import make_settings, serve_in_thread
from tests.fixtures.tiny_bundle import TinyBundle

ROOT = Path(__file__).parents[2]
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
UNKNOWN_PATHS = (
    "/", "/nowhere", "/health", "/health/", "/health/live/", "/health/ready/x", "//health/live",
    "/health/../metrics", "/health/live%2f", "/Health/Live", "/docs", "/redoc", "/openapi.json",
    "/docs/oauth2-redirect", "/v1", "/v1/adapters/", "/metrics/", "/static/x",
)  # fmt: skip


@dataclass(frozen=True)
class Closed:
    """A service with keys, and the key of each scope."""

    client: httpx2.Client
    keys: dict[Scope, str]

    def ask(self, method: str, path: str, scope: Scope) -> httpx2.Response:
        headers = {"authorization": f"Bearer {self.keys[scope]}"}
        return self.client.request(method, path, headers=headers)


def write_keys(folder: Path, scopes: list[Scope]) -> tuple[Path, dict[Scope, str]]:
    made = {scope: make_key(f"tenant-{scope}", [scope]) for scope in scopes}
    path = folder / "keys.json"
    path.write_text(f"[{', '.join(entry for _, entry in made.values())}]")
    return path, {scope: key for scope, (key, _) in made.items()}


@pytest.fixture(scope="module")
def closed(tiny_bundle: TinyBundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Closed]:
    path, keys = write_keys(tmp_path_factory.mktemp("keys"), list(Scope))
    with serve_in_thread(make_settings(tiny_bundle, api_keys_file=path)) as client:
        yield Closed(client, keys)


def list_paths(tiny_bundle: TinyBundle) -> list[str]:
    """Every path that the application knows, its documentation's too."""
    routes = create_app(make_settings(tiny_bundle)).routes
    paths = [context.path for context in iter_route_contexts(routes)]
    assert {"/infer", "/openapi.json", "/metrics"} <= set(paths)
    return [re.sub(r"\{[^}]*\}", "0" * 64, path) for path in paths]


def test_nothing_answers_without_a_key(closed: Closed, tiny_bundle: TinyBundle) -> None:
    for path in {*list_paths(tiny_bundle), *UNKNOWN_PATHS} - OPEN_PATHS:
        for method in METHODS:
            response = closed.client.request(method, path, json={"task": "x"})
            assert response.status_code == 401, (method, path)
            assert response.headers["www-authenticate"] == "Bearer"
            assert "allow" not in response.headers
            if method != "HEAD":
                body = response.json()
                assert body.get("error", body)["code"] == "unauthenticated"


def test_probes_answer_without_a_key(closed: Closed) -> None:
    for path in OPEN_PATHS:
        assert closed.client.get(path).status_code == 200


def test_a_missing_key_is_answered_before_the_body_is_there(closed: Closed) -> None:
    url = closed.client.base_url
    with socket.create_connection((url.host, url.port), timeout=10) as connection:
        head = "POST /infer HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode())
        assert connection.recv(64).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("scope", [Scope.INFER, Scope.GENERATE])
def test_a_missing_scope_is_answered_before_the_body_is_there(closed: Closed, scope: Scope) -> None:
    url = closed.client.base_url
    path = "/infer" if scope is Scope.GENERATE else "/generate-lora"
    with socket.create_connection((url.host, url.port), timeout=10) as connection:
        key = f"Authorization: Bearer {closed.keys[scope]}\r\n"
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{key}"
        connection.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode())
        assert connection.recv(64).startswith(b"HTTP/1.1 403 ")


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("POST", "/infer", Scope.INFER),
        ("POST", "/generate-lora", Scope.GENERATE),
        ("POST", "/v1/completions", Scope.INFER),
        ("POST", "/v1/chat/completions", Scope.INFER),
        ("GET", "/v1/models", Scope.INFER),
        ("GET", "/v1/adapters", Scope.INFER),
        ("PUT", "/v1/aliases/a", Scope.GENERATE),
        ("DELETE", "/v1/aliases/a", Scope.GENERATE),
        ("DELETE", f"/v1/adapters/{'0' * 64}", Scope.GENERATE),
        ("GET", "/metrics", Scope.ADMIN),
    ],
)
def test_a_key_opens_what_its_scope_allows(
    closed: Closed, method: str, path: str, scope: Scope
) -> None:
    for mine in Scope:
        response = closed.ask(method, path, mine)
        if mine in (scope, Scope.ADMIN):
            assert response.status_code in (200, 400, 404, 422), (mine, response.text)
        else:
            body = response.json()
            assert response.status_code == 403
            assert body.get("error", body)["code"] == "forbidden"


def test_words_make_an_adapter_only_with_the_scope_for_it(
    tiny_bundle: TinyBundle, tmp_path: Path
) -> None:
    made = {scope: make_key("acme", [scope]) for scope in (Scope.INFER, Scope.ADMIN)}
    made[Scope.GENERATE] = make_key("acme", [Scope.INFER, Scope.GENERATE])
    path = tmp_path / "keys.json"
    path.write_text(f"[{', '.join(entry for _, entry in made.values())}]")
    with serve_in_thread(make_settings(tiny_bundle, api_keys_file=path)) as client:

        def ask(scope: Scope, path: str, body: dict[str, object]) -> httpx2.Response:
            headers = {"authorization": f"Bearer {made[scope][0]}"}
            return client.post(path, json={"max_tokens": 2, **body}, headers=headers)

        words = "Write a recipe for soup."
        chat = [{"role": "user", "content": "x"}]
        for route, body in (
            ("/infer", {"task": words, "prompt": "x"}),
            ("/infer", {"task": words, "prompt": "x", "out_of_distribution": "base"}),
            ("/v1/completions", {"model": f"task:{words}", "prompt": "x"}),
            ("/v1/completions", {"model": f"task:{words}", "prompt": "x", "stream": True}),
            ("/v1/chat/completions", {"model": f"task:{words}", "messages": chat}),
        ):
            refused = ask(Scope.INFER, route, body)
            problem = refused.json()
            problem = problem.get("error", problem)
            assert (refused.status_code, problem["code"]) == (403, "forbidden"), route
            assert "`generate`" in refused.text
        headers = {"authorization": f"Bearer {made[Scope.INFER][0]}"}
        assert client.get("/v1/adapters", headers=headers).json()["total"] == 0

        served = ask(Scope.GENERATE, "/infer", {"task": words, "prompt": "x"})
        assert (served.status_code, served.json()["cache"]) == (200, "miss")
        cached = ask(Scope.INFER, "/infer", {"task": words, "prompt": "x"})
        assert (cached.status_code, cached.json()["cache"]) == (200, "hit")
        model = {"model": f"task:{words}", "prompt": "x"}
        assert ask(Scope.INFER, "/v1/completions", model).status_code == 200
        other = ask(Scope.ADMIN, "/infer", {"task": "Write a poem.", "prompt": "x"})
        assert (other.status_code, other.json()["cache"]) == (200, "miss")


def test_keys_are_accepted_in_either_header_and_only_whole(closed: Closed) -> None:
    key = closed.keys[Scope.ADMIN]
    good = [
        {"authorization": f"Bearer {key}"},
        {"authorization": f"bearer  {key}"},
        {"x-api-key": key},
    ]
    bad = [
        {},
        {"authorization": key},
        {"authorization": f"Basic {key}"},
        {"authorization": "Bearer"},
        {"authorization": f"Bearer {key[:-1]}"},
        {"authorization": f"Bearer {key}x"},
        {"authorization": f"Bearer {hash_key(key)}"},
        {"authorization": "Bearer x", "x-api-key": key},
        {"x-api-key": ""},
        {"x-api-key": "é".encode("latin-1")},
        {"cookie": f"key={key}"},
    ]
    for headers in good:
        assert closed.client.get("/metrics", headers=headers).status_code == 200
    for headers in bad:
        assert closed.client.get("/metrics", headers=headers).status_code == 401, headers
    assert closed.client.get("/metrics", params={"api_key": key}).status_code == 401


def test_openapi_says_which_scope_each_route_needs(closed: Closed) -> None:
    document = closed.ask("GET", "/openapi.json", Scope.INFER).json()
    assert set(document["components"]["securitySchemes"]) == {"bearer", "api_key"}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if path in OPEN_PATHS:
                assert operation["security"] == []
                continue
            [(scope,)] = {tuple(found) for each in operation["security"] for found in each.values()}
            assert scope in list(Scope)
            assert {"401", "403"} <= set(operation["responses"]), path


def test_a_route_without_a_declared_scope_cannot_be_made() -> None:
    async def forgotten() -> None: ...

    app = FastAPI()
    with pytest.raises(AssertionError, match="say which scope"):
        GuardedRoute("/forgotten", forgotten)
    app.add_api_route("/forgotten", forgotten)
    with pytest.raises(AssertionError, match="use GuardedRoute"):
        check_routes(app.routes)
    app.router.routes.clear()
    app.router.routes.append(GuardedRoute("/forgotten", needs(None)(forgotten)))
    with pytest.raises(AssertionError, match="needs a scope"):
        check_routes(app.routes)


def test_without_keys_everybody_may_do_everything(tiny_bundle: TinyBundle) -> None:
    with serve_in_thread(make_settings(tiny_bundle)) as client:
        assert client.get("/metrics").status_code == 200
        headers = {"authorization": "Bearer EMPTY"}  # clients of OpenAI's API always send one
        assert client.post("/infer", json={}, headers=headers).status_code == 422
        security = client.get("/openapi.json").json()["paths"]["/infer"]["post"]["security"]
        assert {} in security


ENTRY = {"tenant": "acme", "sha256": "0" * 64, "scopes": ["infer"]}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "[1]",
        json.dumps([ENTRY | {"scopes": []}]),
        json.dumps([ENTRY | {"scopes": ["root"]}]),
        json.dumps([ENTRY | {"sha256": "0" * 63}]),
        json.dumps([ENTRY | {"tenant": "a b"}]),
        json.dumps([ENTRY | {"key": "x"}]),
        json.dumps([ENTRY, ENTRY | {"tenant": "other"}]),
    ],
)
def test_a_wrong_keys_file_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content)
    with pytest.raises(InvalidInputError, match=r"keys\.json"):
        read_keys(path)


def test_a_wrong_keys_file_ends_the_start(tmp_path: Path) -> None:
    environment = os.environ | {"ICM_LORA_API_KEYS_FILE": str(tmp_path / "missing.json")}
    done = subprocess.run(
        [sys.executable, "-m", "service"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "missing.json" in done.stderr


def test_new_keys_are_shown_once_and_only_their_hash_is_kept(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training.cli", "keys", "new", "--tenant", "acme"]
    printed = subprocess.run(
        [*command, "--scope", "infer", "--scope", "generate"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    key, entry = printed[0], printed[-1]
    assert key.startswith(KEY_PREFIX)
    assert key not in entry
    path = tmp_path / "keys.json"
    path.write_text(f"[{entry}]")
    found = read_keys(path).find(key)
    assert found is not None
    assert (found.tenant, found.scopes) == ("acme", {"infer", "generate"})
    assert make_key("acme", ["infer"])[0] != key


@pytest.mark.parametrize(("tenant", "scope"), [("", "infer"), ("a/b", "infer"), ("a", "root")])
def test_wrong_new_keys_are_refused(tenant: str, scope: str) -> None:
    with pytest.raises(InvalidInputError):
        make_key(tenant, [scope])


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_metrics_may_have_a_port_of_their_own(tiny_bundle: TinyBundle, tmp_path: Path) -> None:
    path, keys = write_keys(tmp_path, [Scope.ADMIN])
    port = find_free_port()
    settings = make_settings(tiny_bundle, api_keys_file=path, metrics_port=port)
    with serve_in_thread(settings) as client:
        own = f"http://127.0.0.1:{port}"
        answer = client.get(f"{own}/metrics")
        assert answer.status_code == 200
        assert "icm_lora_http_requests_total" in answer.text
        openmetrics = {"accept": "application/openmetrics-text"}
        assert (
            "openmetrics"
            in client.get(f"{own}/metrics", headers=openmetrics).headers["content-type"]
        )
        assert client.get(f"{own}/v1/adapters").status_code == 404
        assert client.post(f"{own}/metrics").status_code == 405
        assert client.get("/metrics").status_code == 401
        headers = {"authorization": f"Bearer {keys[Scope.ADMIN]}"}
        assert client.get("/metrics", headers=headers).status_code == 404
        assert "/metrics" not in client.get("/openapi.json", headers=headers).json()["paths"]
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{own}/metrics")


def test_a_metrics_port_that_is_taken_ends_the_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        environment = os.environ | {
            "ICM_LORA_PORT": "0",
            "ICM_LORA_METRICS_PORT": str(taken.getsockname()[1]),
        }
        done = subprocess.run(
            [sys.executable, "-m", "service"],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode not in (0, 2)  # uvicorn's own, as for its main port
    assert "ICM_LORA_METRICS_PORT" in done.stderr
