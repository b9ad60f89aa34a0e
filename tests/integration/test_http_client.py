"""The Python client against the real service with the tiny bundle."""

import asyncio
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.client import ApiError, AsyncClient, Client, calls
from tests.fixtures.http_service import make_settings, serve_in_thread
from tests.fixtures.tiny_bundle import TinyBundle

RECIPE = "Write a cooking recipe."
CLIENTS = (Client, AsyncClient)


@pytest.fixture(scope="module")
def url(tiny_bundle: TinyBundle) -> Iterator[str]:
    with serve_in_thread(make_settings(tiny_bundle)) as running:
        yield str(running.base_url)


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


def test_adapter_is_made_used_downloaded_and_deleted(client: Client) -> None:
    assert client.wait_until_ready().status == "ready"
    adapter = client.generate(RECIPE, mode="sample", seed=3)
    assert (adapter.modality, adapter.nearest[0].name) == ("text", "recipes")
    answer = client.infer("Preheat", adapter_id=adapter.adapter_id, max_tokens=4)
    assert answer.usage.completion_tokens <= 4
    assert answer.receipt.adapter_id == adapter.adapter_id
    assert answer.receipt.vector_sha256 == adapter.vector_sha256
    assert client.get_adapter(adapter.adapter_id).vector_sha256 == adapter.vector_sha256
    page = client.list_adapters(limit=1)
    assert [each.adapter_id for each in page.adapters] == [adapter.adapter_id]
    with zipfile.ZipFile(io.BytesIO(client.download_adapter(adapter.adapter_id))) as archive:
        assert "adapter_config.json" in archive.namelist()
    assert client.delete_adapter(adapter.adapter_id).adapter_id == adapter.adapter_id
    with pytest.raises(ApiError) as caught:
        client.get_adapter(adapter.adapter_id)
    assert (caught.value.status, caught.value.code) == (404, "adapter_not_found")


def test_downloaded_adapter_can_be_uploaded(client: Client, tmp_path: Path) -> None:
    adapter = client.generate(RECIPE)
    with zipfile.ZipFile(io.BytesIO(client.download_adapter(adapter.adapter_id))) as archive:
        archive.extractall(tmp_path)
    uploaded = client.upload_adapter(tmp_path, ttl_seconds=60)
    assert uploaded.adapter_id != adapter.adapter_id
    assert (uploaded.regenerable, uploaded.recipe, uploaded.degraded) == (False, None, ())
    answer = client.infer("Preheat", adapter_id=uploaded.adapter_id, max_tokens=2)
    assert answer.receipt.adapter_id == uploaded.adapter_id


def test_examples_describe_a_task_with_words_or_without(client: Client) -> None:
    texts = ["Preheat the oven.", "Slice the apples."]
    alone = client.generate(examples=texts)
    both = client.generate(RECIPE, examples=texts)
    assert alone.recipe is not None
    assert both.recipe is not None
    assert alone.recipe["examples"] == both.recipe["examples"] != ""
    assert alone.adapter_id != both.adapter_id
    assert alone.refinement is None
    refined = client.generate(examples=texts, refine_steps=1)
    assert refined.refinement is not None
    assert refined.refinement.steps == 1
    with pytest.raises(ApiError, match=r"body\.examples") as caught:
        client.generate(examples=[])
    assert (caught.value.status, caught.value.code) == (422, "invalid_request")


def test_wrong_fields_are_named(client: Client) -> None:
    with pytest.raises(ApiError, match=r"body\.seed") as caught:
        client.generate(RECIPE, seed=-1)
    assert (caught.value.status, caught.value.code) == (422, "invalid_request")


def test_alias_is_replaced_by_generation(client: Client) -> None:
    first = client.put_alias("cook", task=RECIPE, pinned=True, expected_generation=0)
    assert "icm_lora_pinned_adapters 1.0" in client.metrics().splitlines()
    second = client.put_alias("cook", task="Write Python source code.", expected_generation=1)
    assert (first.generation, second.generation) == (1, 2)
    with pytest.raises(ApiError) as caught:
        client.put_alias("cook", task=RECIPE, expected_generation=1)
    assert caught.value.status == 409
    assert client.get_alias("cook").adapter_id == second.adapter_id
    assert "icm_lora_pinned_adapters 0.0" in client.metrics().splitlines()
    assert [alias.name for alias in client.list_aliases().aliases] == ["cook"]
    answer = client.infer("Preheat", alias="cook", max_tokens=2)
    assert answer.receipt.adapter_id == second.adapter_id
    assert client.delete_alias("cook", expected_generation=2).name == "cook"
    assert client.list_aliases().total == 0


def test_openai_routes_answer_whole_and_in_pieces(client: Client) -> None:
    adapter = client.generate(RECIPE)
    assert any(model.parent is None for model in client.models())
    options: calls.CompletionOptions = {"max_tokens": 8, "temperature": 0.0}
    whole = client.complete("Preheat", model=adapter.adapter_id, **options)
    pieces = client.complete("Preheat", model=adapter.adapter_id, stream=True, **options)
    text = "".join(choice.text for piece in pieces for choice in piece.choices)
    assert text == whole.choices[0].text
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 8
    with pytest.raises(ApiError) as caught:
        client.complete("Preheat", model="0" * 64)
    assert caught.value.status == 404


async def use_service(url: str) -> tuple[str, str]:
    async with AsyncClient(url) as client:
        await client.wait_until_ready()
        adapter = await client.generate(RECIPE)
        answer = await client.infer("Preheat", task=RECIPE, max_tokens=4)
        stream = await client.complete("Preheat", model="base", stream=True, max_tokens=4)
        pieces = [piece async for piece in stream]
        assert pieces[0].model
        with pytest.raises(ApiError, match="adapter"):
            await client.get_adapter("0" * 64)
        return adapter.adapter_id, answer.receipt.adapter_id


def test_coroutines_do_the_same(url: str) -> None:
    made, used = asyncio.run(use_service(url))
    assert made == used


def test_both_clients_have_the_same_methods() -> None:
    names = [{name for name in vars(kind) if not name.startswith("_")} for kind in CLIENTS]
    assert names[0] == names[1]
