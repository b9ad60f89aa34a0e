"""Adapters, requests, and what each request alone is answered with."""

from dataclasses import dataclass
from itertools import product
from typing import Any

from tests.bench.client import HttpClient

ASKS = (
    ("Preheat the oven", 48),
    ("def main(", 20),
    ("a", 33),
    ("The news of the day: ", 5),
    ("To be", 1),
)
"""Prompts and tokens: rows that run together begin and end at different times."""

TELLING_TOKENS = 20  # an answer of so many differs from adapter to adapter
NUM_SCALED = 10
LEAST_APART = 0.75
"""Share of the adapters that the longest answers to a prompt must tell apart."""

LOGPROB_TOLERANCE = 2e-3  # nats; float32 in other batches, and rounding

COMPLETIONS = "/v1/completions"
ALIASES = "/v1/aliases/{name}"
LOAD = "/v1/load_lora_adapter"
UNLOAD = "/v1/unload_lora_adapter"


@dataclass(frozen=True)
class Specimen:
    """An adapter that clients fight over.

    Attributes:
        body: of `/generate-lora`, which makes it anew whenever it was deleted.
        adapter_id: the service's.
        vector_sha256: of its values; None for the base.
    """

    body: dict[str, Any]
    adapter_id: str
    vector_sha256: str | None


@dataclass(frozen=True)
class Reference:
    """What a request alone is answered with.

    Attributes:
        text: of the completion.
        tokens: their number.
        logprobs: of its tokens, where the service tells them.
    """

    text: str
    tokens: int
    logprobs: tuple[float, ...] | None


@dataclass(frozen=True)
class World:
    """What a run is about.

    Attributes:
        specimens: adapters.
        base: the base model, as an adapter that nobody can delete.
        references: by (adapter id, prompt, length).
        routes: paths of the service's OpenAPI document.
    """

    specimens: tuple[Specimen, ...]
    base: Specimen
    references: dict[tuple[str, str, int], Reference]
    routes: frozenset[str]

    def find(self, adapter_id: str) -> Specimen | None:
        """The specimen of an id."""
        everyone = (self.base, *self.specimens)
        return next((each for each in everyone if each.adapter_id == adapter_id), None)


async def prepare_world(client: HttpClient, tasks: tuple[str, ...]) -> World:
    """Generates the adapters and asks every question once, one after another.

    The answers must tell the adapters apart, or a run would prove nothing.
    """
    routes = frozenset((await client.request("GET", "/openapi.json")).json()["paths"])
    specimens: list[Specimen] = []
    bodies: list[dict[str, Any]] = [{"task": task, "modality": "text"} for task in tasks]
    for number in range(NUM_SCALED):  # `/infer` by task makes those of full strength only
        strength = round(0.3 + 0.65 * number / NUM_SCALED, 3)
        bodies.append({**bodies[number % len(tasks)], "strength": strength})
    for body in bodies:
        reply = await client.post("/generate-lora", body)
        assert reply.status == 200, reply.body
        answer = reply.json()
        specimens.append(Specimen(body, answer["adapter_id"], answer["vector_sha256"]))
    assert len({each.vector_sha256 for each in specimens}) == len(specimens)
    base = Specimen({}, "base", None)
    references = {}
    for specimen, (prompt, length) in product((base, *specimens), ASKS):
        key = (specimen.adapter_id, prompt, length)
        references[key] = await _ask(client, *key, told=COMPLETIONS in routes)
    for prompt, length in ASKS:
        said = {references[each.adapter_id, prompt, length] for each in specimens}
        if length >= TELLING_TOKENS:
            assert len(said) >= LEAST_APART * len(specimens), f"{len(said)} answers to {prompt!r}"
    return World(tuple(specimens), base, references, routes)


async def _ask(
    client: HttpClient, adapter_id: str, prompt: str, length: int, *, told: bool
) -> Reference:
    asked = {"prompt": prompt, "max_tokens": length}
    reply = await client.post("/infer", {**asked, "adapter_id": adapter_id})
    assert reply.status == 200, reply.body
    answer = reply.json()
    logprobs = None
    if told:
        body = {**asked, "model": adapter_id, "temperature": 0, "logprobs": 0}
        reply = await client.post(COMPLETIONS, body)
        assert reply.status == 200, reply.body
        choice = reply.json()["choices"][0]
        assert choice["text"] == answer["text"], "the two routes do not agree"
        logprobs = tuple(choice["logprobs"]["token_logprobs"])
    return Reference(answer["text"], answer["usage"]["completion_tokens"], logprobs)
