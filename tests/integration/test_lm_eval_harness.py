"""lm-evaluation-harness against the served application; its numbers beside PEFT's own."""

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from peft import PeftModel

from service.inference.base_model import EMBEDDED_TINY, BaseModel, load_base_model
from tests.fixtures.harness import run_harness, write_task
from tests.fixtures.http_service import make_settings, serve_in_thread
from tests.fixtures.tiny_bundle import TinyBundle

# PEFT calls a name that transformers renamed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
MODEL = "task:Write a cooking recipe, and explain it = well."
PAIRS = [
    {"context": "Preheat the", "continuation": " oven to 200 degrees."},
    {"context": "Slice", "continuation": " the onions"},
    {"context": "def f(x):", "continuation": "\n    return x"},
    {"context": "naïve", "continuation": " café"},
]
TEXTS = [{"text": "Boil the rice until it is done."}, {"text": "Serve it."}]
GENERATION = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}


@pytest.fixture(scope="module")
def http(tiny_bundle: TinyBundle) -> Iterator[httpx2.Client]:
    with serve_in_thread(make_settings(tiny_bundle)) as client:
        yield client


@pytest.fixture(scope="module")
def base(tiny_bundle: TinyBundle) -> BaseModel:
    return load_base_model(
        EMBEDDED_TINY, device="cpu", dtype="float32", cache_dir=tiny_bundle.cache_dir
    )


@pytest.fixture(scope="module")
def adapted(http: httpx2.Client, base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """PEFT's model with the adapter that the service gives away."""
    body = {"model": MODEL, "prompt": "a", "max_tokens": 1}
    answer = http.post("/v1/completions", json=body).json()
    adapter_id = answer["icm_lora"]["receipt"]["adapter_id"]
    folder = tmp_path_factory.mktemp("peft")
    content = http.get(f"/v1/adapters/{adapter_id}/peft.zip").content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(folder)
    [config] = folder.rglob("adapter_config.json")
    return PeftModel.from_pretrained(base.model, str(config.parent), autocast_adapter_dtype=False)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_task(
        folder,
        "continuations",
        PAIRS,
        output_type="loglikelihood",
        doc_to_text="{{context}}",
        doc_to_target="{{continuation}}",
        metric_list=[{"metric": "perplexity"}, {"metric": "acc"}],
    )
    write_task(
        folder,
        "texts",
        TEXTS,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    write_task(
        folder,
        "writing",
        PAIRS[:2],
        output_type="generate_until",
        doc_to_text="{{context}}",
        doc_to_target="{{continuation}}",
        generation_kwargs=GENERATION,
        metric_list=[{"metric": "exact_match"}],
    )
    return folder


def score(model: Any, base: BaseModel, text: str) -> list[float]:
    """Log-probability of each token but the first, by transformers alone."""
    ids = torch.tensor([base.tokenizer(text)["input_ids"]])
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, :-1].float()
    found: list[float] = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist()
    return found


def test_logprobs_of_tokens_are_those_of_peft(
    http: httpx2.Client, base: BaseModel, adapted: Any
) -> None:
    texts = [pair["context"] + pair["continuation"] for pair in PAIRS]
    body = {"prompt": texts, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    answers = {
        name: http.post("/v1/completions", json={**body, "model": name}).json()
        for name in (MODEL, "base")
    }
    with adapted.disable_adapter():
        plain = [score(adapted, base, text) for text in texts]
    for name, expected in {
        MODEL: [score(adapted, base, text) for text in texts],
        "base": plain,
    }.items():
        for choice, values in zip(answers[name]["choices"], expected, strict=True):
            assert choice["logprobs"]["token_logprobs"][1:-1] == pytest.approx(values, abs=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("tokenized_requests", [False, True])
def test_the_harness_runs_unchanged(
    http: httpx2.Client,
    base: BaseModel,
    adapted: Any,
    tasks: Path,
    tiny_bundle: TinyBundle,
    tokenized_requests: bool,
    batch_size: int,
) -> None:
    found = run_harness(
        tasks,
        str(http.base_url),
        MODEL,
        tiny_bundle.cache_dir / "base" / "tiny-random-v1",
        ["continuations", "texts", "writing"],
        tokenized_requests=tokenized_requests,
        batch_size=batch_size,
        max_length=256,
    )
    for sample in found["samples"]["continuations"]:
        pair = sample["doc"]
        values = score(adapted, base, pair["context"] + pair["continuation"])
        num_tokens = len(base.tokenizer(pair["continuation"])["input_ids"])
        [[[logprob, _]]] = sample["resps"]
        assert float(logprob) == pytest.approx(sum(values[-num_tokens:]), abs=1e-3)
    for sample in found["samples"]["texts"]:
        values = score(adapted, base, base.tokenizer.eos_token + sample["doc"]["text"])
        assert float(json.dumps(first(sample["resps"]))) == pytest.approx(sum(values), abs=1e-3)
    for sample in found["samples"]["writing"]:
        body = {"task": MODEL.removeprefix("task:"), "prompt": sample["doc"]["context"]}
        ours = http.post("/infer", json={**body, "max_tokens": 12, "stop": ["\n"]}).json()
        assert first(sample["resps"]) == ours["text"]


def first(nested: Any) -> Any:
    """The one value within lists of one."""
    while isinstance(nested, list):
        [nested] = nested if len(nested) == 1 else nested[:1]
    return nested
