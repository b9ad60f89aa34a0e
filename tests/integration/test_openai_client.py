"""OpenAI's own client against the served application, unchanged."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from service.synthesis.adapter_recipe import AdapterRecipe
from tests.fixtures.http_service import make_settings, serve_in_thread
from tests.fixtures.tiny_bundle import TinyBundle
from tests.fixtures.tiny_chat import add_chat_template

RECIPE = "Write a cooking recipe."
MODEL = f"task:{RECIPE}"
BASE = "embedded:tiny-random"
CHAT: list[Any] = [
    {"role": "system", "content": "Cook."},
    {"role": "user", "content": [{"type": "text", "text": "Rice"}]},
]


@pytest.fixture(scope="module")
def http(
    tiny_bundle: TinyBundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx2.Client]:
    bundle = add_chat_template(tiny_bundle, tmp_path_factory.mktemp("chat"))
    with serve_in_thread(make_settings(bundle)) as client:
        yield client


@pytest.fixture(scope="module")
def client(http: httpx2.Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client: openai.OpenAI, **options: Any) -> Any:
    fields = {"model": MODEL, "prompt": "Preheat", "max_tokens": 8, "temperature": 0}
    return client.completions.create(**{**fields, **options})


def chat(client: openai.OpenAI, **options: Any) -> Any:
    fields = {"model": MODEL, "messages": CHAT, "max_completion_tokens": 8, "temperature": 0}
    return client.chat.completions.create(**{**fields, **options})


def infer(http: httpx2.Client, prompt: str, **options: Any) -> dict[str, Any]:
    body = {"task": RECIPE, "prompt": prompt, "max_tokens": 8, **options}
    answer: dict[str, Any] = http.post("/infer", json=body).json()
    return answer


def test_a_completion_is_what_infer_answers(client: openai.OpenAI, http: httpx2.Client) -> None:
    ours = infer(http, "Preheat")
    answer = complete(client)
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason) == (ours["text"], ours["finish_reason"])
    assert answer.usage.model_dump(exclude_unset=True) == ours["usage"]
    assert answer.object == "text_completion"
    assert ours["receipt"]["bundle"]["digest"].startswith(answer.system_fingerprint)
    assert answer.icm_lora["receipt"]["vector_sha256"] == ours["receipt"]["vector_sha256"]
    assert answer.icm_lora["degraded"] == []
    assert answer.icm_lora["milliseconds"]["total"] > 0


def test_the_adapter_is_chosen_by_task_by_id_and_the_base_by_name(
    client: openai.OpenAI, tiny_bundle: TinyBundle
) -> None:
    recipe = AdapterRecipe.build(task=RECIPE, bundle_digest=tiny_bundle.bundle.digest)
    by_task = complete(client)
    by_id = complete(client, model=recipe.adapter_id)
    assert by_task.icm_lora["receipt"]["adapter_id"] == recipe.adapter_id
    assert by_id.icm_lora["receipt"]["adapter_id"] == recipe.adapter_id
    assert by_id.choices[0].text == by_task.choices[0].text
    texts = {complete(client, model=name).choices[0].text for name in ("base", BASE)}
    assert len(texts) == 1
    assert by_task.choices[0].text not in texts


def test_models_have_cards(client: openai.OpenAI) -> None:
    adapter = complete(client).icm_lora["receipt"]["adapter_id"]
    cards = {card.id: card for card in client.models.list()}
    assert {BASE, adapter} <= set(cards)
    assert cards[adapter].parent == BASE
    assert cards[BASE].parent is None
    assert client.models.retrieve(adapter) == cards[adapter]
    assert client.models.retrieve(BASE) == cards[BASE]
    for missing in ("0" * 64, "no-such/model", MODEL):
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve(missing)
        assert caught.value.code == "model_not_found"


def test_an_alias_is_a_model(client: openai.OpenAI, http: httpx2.Client) -> None:
    assert http.put("/v1/aliases/cook", json={"task": RECIPE}).status_code == 200
    by_task, by_alias = complete(client), complete(client, model="cook")
    assert by_alias.choices == by_task.choices
    for fact in ("adapter_id", "vector_sha256", "slot", "generation"):
        assert by_alias.icm_lora["receipt"][fact] == by_task.icm_lora["receipt"][fact]
    assert by_alias.icm_lora["alias"] == {"name": "cook", "generation": 1}
    card = client.models.retrieve("cook")
    assert (card.root, card.parent) == (by_task.icm_lora["receipt"]["adapter_id"], BASE)  # type: ignore[attr-defined]
    assert card in list(client.models.list())


def test_a_stream_is_the_same_text(client: openai.OpenAI) -> None:
    whole = complete(client, max_tokens=24)
    chunks = list(complete(client, max_tokens=24, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].icm_lora["receipt"] == whole.icm_lora["receipt"]
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_tells_usage_where_asked(client: openai.OpenAI) -> None:
    whole = complete(client, n=2)
    *chunks, last = complete(client, n=2, stream=True, stream_options={"include_usage": True})
    assert all(chunk.usage is None for chunk in chunks)
    assert (last.choices, last.usage) == ([], whole.usage)
    assert last.icm_lora["receipt"] == whole.icm_lora["receipt"]


def test_a_stream_ends_with_done(http: httpx2.Client) -> None:
    body = {"model": "base", "prompt": "a", "max_tokens": 2, "stream": True}
    response = http.post("/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: ")) for event in events[:-2])


def test_several_prompts_and_choices_are_numbered_in_order(client: openai.OpenAI) -> None:
    prompts = ["Preheat", "Slice"]
    answer = complete(client, prompt=prompts, n=2)
    singles = [complete(client, prompt=prompt) for prompt in prompts]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    expected = [single.choices[0].text for single in singles for _ in range(2)]
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage.prompt_tokens == sum(single.usage.prompt_tokens for single in singles)
    assert answer.usage.completion_tokens == 2 * sum(s.usage.completion_tokens for s in singles)


def test_choices_are_sampled_with_seeds_in_a_row(client: openai.OpenAI) -> None:
    answer = complete(client, temperature=1, n=3, seed=5)
    texts = [choice.text for choice in answer.choices]
    singles = [complete(client, temperature=1, seed=5 + i).choices[0].text for i in range(3)]
    assert texts == singles
    assert len(set(texts)) == 3
    drawn = complete(client, temperature=1)
    again = complete(client, temperature=1, seed=drawn.icm_lora["seed"])
    assert drawn.choices[0].text == again.choices[0].text


def test_stop_texts_end_a_completion(client: openai.OpenAI) -> None:
    text = complete(client, max_tokens=16).choices[0].text
    stop = text[4:6]
    for chosen in (stop, [stop, "never"]):
        [choice] = complete(client, max_tokens=16, stop=chosen).choices
        assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")


def test_tokens_are_a_prompt_like_their_text(
    client: openai.OpenAI, tiny_bundle: TinyBundle
) -> None:
    ids = tokenize(tiny_bundle, "Preheat")
    by_text = complete(client, prompt=["Preheat", "Preheat"], echo=True)
    by_tokens = complete(client, prompt=[ids, ids], echo=True)
    assert by_tokens.choices == by_text.choices
    assert complete(client, prompt=ids, echo=True).choices == by_text.choices[:1]


def test_a_completion_has_logprobs_of_its_tokens(client: openai.OpenAI) -> None:
    [choice] = complete(client, logprobs=3).choices
    found = choice.logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == 8
    for logprob, top in zip(found.token_logprobs, found.top_logprobs, strict=True):
        assert logprob == max(top.values())  # greedy
        assert 1 <= len(top) <= 3
    chunks = list(complete(client, logprobs=3, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [value for part in parts for value in getattr(part, field)]
        assert joined == getattr(found, field), field


def test_echo_gives_logprobs_of_the_prompt(client: openai.OpenAI) -> None:
    [choice] = complete(client, echo=True, logprobs=1).choices
    assert choice.text.startswith("Preheat")
    found = choice.logprobs
    assert found.tokens[:7] == list("Preheat")
    assert found.text_offset[:7] == list(range(7))
    assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
    assert len(found.tokens) == 7 + 8
    [scored] = complete(client, echo=True, logprobs=1, max_tokens=0).choices
    assert (scored.text, scored.finish_reason) == ("Preheat", "length")
    assert scored.logprobs.token_logprobs == found.token_logprobs[:7]
    [streamed] = complete(client, echo=True, logprobs=1, stream=True)
    assert streamed.choices == [choice]


def test_a_chat_is_a_completion_of_its_template(client: openai.OpenAI) -> None:
    answer = chat(client)
    [choice] = answer.choices
    prompt = "[system]Cook.[user]Rice[assistant]"
    assert choice.message.content == complete(client, prompt=prompt).choices[0].text
    assert (choice.message.role, answer.object) == ("assistant", "chat.completion")
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.icm_lora["receipt"]["slot"] >= 1
    assert len(chat(client, n=2, temperature=1).choices) == 2


def test_a_chat_streams(client: openai.OpenAI) -> None:
    whole = chat(client)
    chunks = list(chat(client, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert [delta.role for delta in deltas[1:]] == [None] * len(deltas[1:])
    text = "".join(delta.content or "" for delta in deltas)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].icm_lora["receipt"] == whole.icm_lora["receipt"]


def test_a_chat_has_logprobs(client: openai.OpenAI) -> None:
    [choice] = chat(client, logprobs=True, top_logprobs=2).choices
    assert len(choice.logprobs.content) == 8
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 2
        assert token.logprob == token.top_logprobs[0].logprob
    [plain] = chat(client, logprobs=True).choices
    assert [token.top_logprobs for token in plain.logprobs.content] == [[]] * 8


def test_a_template_may_refuse(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="system must come first") as caught:
        chat(client, messages=[*CHAT, CHAT[0]])
    assert caught.value.param == "messages"


def test_the_asynchronous_client_may_ask_at_once(http: httpx2.Client) -> None:
    async def ask() -> list[str]:
        address = f"{http.base_url}/v1"
        async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0) as client:
            whole = client.completions.create(
                model=MODEL, prompt="Preheat", max_tokens=8, temperature=0
            )
            stream = client.completions.create(
                model=MODEL, prompt="Preheat", max_tokens=8, temperature=0, stream=True
            )
            answer, chunks = await asyncio.gather(whole, stream)
            text = "".join([chunk.choices[0].text async for chunk in chunks])
            return [answer.choices[0].text, text]

    first, second = asyncio.run(ask())
    assert first == second


@pytest.mark.parametrize(
    ("options", "error", "code"),
    [
        ({"model": "no-such-model"}, openai.NotFoundError, "model_not_found"),
        ({"model": "0" * 64}, openai.NotFoundError, "model_not_found"),
        ({"temperature": -1}, openai.BadRequestError, "invalid_request"),
        ({"prompt": "a" * 600}, openai.BadRequestError, "invalid_input"),
        ({"prompt": [[5000]]}, openai.BadRequestError, "invalid_parameter"),
        ({"presence_penalty": 1}, openai.BadRequestError, "unsupported_parameter"),
        ({"extra_body": {"typo": 1}}, openai.BadRequestError, "unknown_parameter"),
        ({"model": "task:"}, openai.BadRequestError, "invalid_input"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_openais(
    client: openai.OpenAI,
    options: dict[str, Any],
    error: type[openai.APIStatusError],
    code: str,
    stream: bool,
) -> None:
    with pytest.raises(error) as caught:
        complete(client, stream=stream, **options)
    assert caught.value.code == code
    assert caught.value.type == "invalid_request_error"


def test_wrong_methods_and_bodies_are_openais_errors(http: httpx2.Client) -> None:
    for path, allowed in {"/v1/completions": "POST", "/v1/models/a/b": "GET"}.items():
        response = http.delete(path)
        assert (response.status_code, response.headers["allow"]) == (405, allowed)
        assert response.json()["error"]["code"] == "method_not_allowed"
    headers = {"content-type": "application/json"}
    response = http.post("/v1/completions", content=b'{"model"', headers=headers)
    assert (response.status_code, response.json()["error"]["param"]) == (400, None)
    response = http.post("/v1/chat/completions", content=b" " * 300_000, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def test_a_base_without_a_chat_template_says_so(tiny_bundle: TinyBundle) -> None:
    with serve_in_thread(make_settings(tiny_bundle)) as http:
        body = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
        response = http.post("/v1/chat/completions", json=body)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "unsupported_parameter"


def tokenize(bundle: TinyBundle, text: str) -> list[int]:
    from transformers import AutoTokenizer

    folder = bundle.cache_dir / "base" / f"{BASE.removeprefix('embedded:')}-v1"
    ids: list[int] = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    return ids
