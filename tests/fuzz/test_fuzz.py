"""A few hundred requests that schemathesis makes of the OpenAPI document, in every test run."""

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from service.api.auth import OPEN_PATHS
from service.api.keys import make_key
from tests.fixtures.http_service import make_settings, serve_in_thread
from tests.fixtures.tiny_bundle import TinyBundle
from tests.fuzz.run import CHECKS, STRANGER_CHECKS, count_statuses, run_schemathesis


@pytest.fixture(scope="module")
def guarded(
    tiny_bundle: TinyBundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[httpx2.Client, dict[str, str], Path]]:
    """A service with keys: its client, the headers with a key, and its OpenAPI document's file."""
    folder = tmp_path_factory.mktemp("fuzz")
    key, entry = make_key("fuzzer", ["infer", "generate", "admin"])
    (folder / "keys.json").write_text(f"[{entry}]")
    settings = make_settings(
        tiny_bundle, api_keys_file=folder / "keys.json", runtime_lora_updating=True
    )
    headers = {"Authorization": f"Bearer {key}"}
    with serve_in_thread(settings) as client:
        document = folder / "openapi.json"
        document.write_bytes(client.get("/openapi.json", headers=headers).content)
        yield client, headers, document


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("known", [True, False], ids=["with a key", "a stranger"])
def test_nothing_undocumented_happens(
    guarded: tuple[httpx2.Client, dict[str, str], Path], known: bool
) -> None:
    client, headers, document = guarded
    before = count_statuses(client.get("/metrics", headers=headers).text)
    result = run_schemathesis(
        str(client.base_url).rstrip("/"),
        document,
        max_examples=12,
        checks=CHECKS if known else STRANGER_CHECKS,
        headers=headers if known else None,
        phases="examples,fuzzing",
    )
    assert result.passed, result.output
    assert result.cases > 100, result.output
    grown = count_statuses(client.get("/metrics", headers=headers).text) - before
    assert not [each for each in grown if each[1] >= 500], grown
    if not known:
        answered = {route for route, status in grown if status != 401}
        assert answered <= {*OPEN_PATHS, "/metrics", "unmatched"}, grown
