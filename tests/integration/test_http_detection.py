"""Detection over real HTTP: a tiny detection bundle and a tiny text bundle in one process."""

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from PIL import Image

from service.api.loading import open_resources
from service.api.quotas import Quotas
from service.errors import InvalidBundleError
from service.metrics import ServiceMetrics
from service.synthesis.adapter_recipe import AdapterRecipe
from tests.fixtures.http_service import make_both_settings, make_settings, serve_in_thread
from tests.fixtures.redis_server import RedisServer
from tests.fixtures.tiny_bundle import TinyBundle
from tests.fixtures.tiny_detection_bundle import BIRD, SOFA, TinyDetectionBundle, draw_file

RECIPE = "Write a cooking recipe."
FILE = draw_file()
IMAGE = base64.b64encode(FILE).decode()
ALL = {"score_threshold": 0.0}  # of the random base's boxes

UNDECIDED = dict.fromkeys(
    ("decision", "nearest_task", "in_distribution", "similarity", "threshold")
)
"""In a receipt where the request named its adapter."""


@pytest.fixture(scope="module")
def client(
    tiny_bundle: TinyBundle, tiny_detection_bundle: TinyDetectionBundle
) -> Iterator[httpx2.Client]:
    settings = make_both_settings(
        tiny_bundle, tiny_detection_bundle, max_image_bytes=1_000_000, max_image_pixels=40_000
    )
    with serve_in_thread(settings) as running:
        yield running


def post(client: httpx2.Client, path: str, **body: Any) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def refuse(client: httpx2.Client, path: str, **body: Any) -> tuple[int, str]:
    response = client.post(path, json=body)
    return response.status_code, response.json()["code"]


def test_description_is_generated_by_the_bundle_it_is_for(
    client: httpx2.Client, tiny_bundle: TinyBundle, tiny_detection_bundle: TinyDetectionBundle
) -> None:
    for task, modality, bundle in (
        (RECIPE, "text", tiny_bundle.bundle),
        ("Explain how to cook a soup.", "text", tiny_bundle.bundle),
        (SOFA, "detection", tiny_detection_bundle.bundle),
        ("find all the birds in my picture", "detection", tiny_detection_bundle.bundle),
    ):
        answer = post(client, "/generate-lora", task=task)
        assert (answer["modality"], answer["bundle"]["name"]) == (modality, bundle.name)
        again = post(client, "/generate-lora", task=task)
        assert (again["adapter_id"], again["cache"]) == (answer["adapter_id"], "hit")


def test_modality_can_be_named(
    client: httpx2.Client, tiny_detection_bundle: TinyDetectionBundle
) -> None:
    answer = post(client, "/generate-lora", task=RECIPE, modality="detection")
    recipe = AdapterRecipe.build(task=RECIPE, bundle_digest=tiny_detection_bundle.bundle.digest)
    expected = tiny_detection_bundle.synthesizer.synthesize(recipe)
    assert answer["modality"] == "detection"
    assert answer["vector_sha256"] == expected.vector_sha256
    assert answer["recipe"]["encoder"] == tiny_detection_bundle.bundle.encoder_id
    assert answer["recipe"]["examples"] == ""
    other = post(client, "/generate-lora", task=RECIPE, modality="text")
    assert other["adapter_id"] != answer["adapter_id"]


def test_generated_adapter_moves_the_boxes_and_says_so(client: httpx2.Client) -> None:
    adapter = post(client, "/generate-lora", task=SOFA, strength=4)
    found = post(client, "/infer", adapter_id=adapter["adapter_id"], image=IMAGE, **ALL)
    base = post(client, "/infer", adapter_id="base", prompt=SOFA, image=IMAGE, **ALL)
    assert found["boxes"] != base["boxes"]
    assert (found["width"], found["height"]) == (90, 60)
    assert (
        found["receipt"]
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
    for answer in (found, base):
        assert answer["boxes"]
        assert answer["rendered_png"] is None
        assert answer["cache"] is None
        assert {"image", "queue", "total"} <= set(answer["milliseconds"])
        scores = [box["score"] for box in answer["boxes"]]
        assert scores == sorted(scores, reverse=True)
        for box in answer["boxes"]:
            left, top, right, bottom = box["box"]
            assert 0 <= left <= right <= 90
            assert 0 <= top <= bottom <= 60
            assert 0 <= box["score"] <= 1
            assert box["label"] == "sofa"


def test_task_generates_then_detects(client: httpx2.Client) -> None:
    answer = post(client, "/infer", task=BIRD, image=IMAGE, **ALL)
    assert answer["cache"] in ("miss", "hit")
    assert {box["label"] for box in answer["boxes"]} == {"bird"}
    again = post(client, "/infer", task=BIRD, image=IMAGE, **ALL)
    assert again["cache"] == "hit"
    assert again["boxes"] == answer["boxes"]
    assert again["receipt"]["adapter_id"] == answer["receipt"]["adapter_id"]


def test_task_of_infer_follows_the_image_not_the_words(client: httpx2.Client) -> None:
    detected = post(client, "/infer", task=RECIPE, image=IMAGE)
    assert detected["receipt"]["bundle"]["name"] == "tiny-detection"
    completed = post(client, "/infer", task=SOFA, prompt="x", max_tokens=2)
    assert completed["receipt"]["bundle"]["name"] == "tiny"


def test_form_and_json_and_data_url_give_the_same(client: httpx2.Client) -> None:
    fields = {"task": SOFA, "num_beams": 2, "max_boxes": 3, **ALL}
    by_json = post(client, "/infer", image=IMAGE, **fields)
    by_url = post(client, "/infer", image=f"data:image/png;base64,{IMAGE}", **fields)
    form = {name: str(value) for name, value in fields.items()}
    by_form = client.post("/infer", data=form, files={"image": ("x.png", FILE, "image/png")})
    assert by_form.status_code == 200, by_form.text
    boxes = [answer["boxes"] for answer in (by_json, by_url, by_form.json())]
    assert boxes[0] == boxes[1] == boxes[2]
    assert 1 <= len(boxes[0]) <= 3


def test_form_without_an_image_completes_a_prompt(client: httpx2.Client) -> None:
    form = [("adapter_id", "base"), ("prompt", "Preheat"), ("max_tokens", "3"), ("stop", "q")]
    parts = [(name, (None, value)) for name, value in [*form, ("stop", "z")]]
    response = client.post("/infer", files=parts)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] <= 3


def test_rendered_picture_has_the_images_size_and_boxes(client: httpx2.Client) -> None:
    answer = post(client, "/infer", task=SOFA, image=IMAGE, render=True, **ALL)
    picture = Image.open(io.BytesIO(base64.b64decode(answer["rendered_png"])), formats=["PNG"])
    assert picture.size == (answer["width"], answer["height"])
    assert picture.convert("RGB").tobytes() != Image.open(io.BytesIO(FILE)).tobytes()
    assert "render" in answer["milliseconds"]
    turned = Image.Exif()
    turned[0x0112] = 6
    upright = base64.b64encode(draw_file(kind="JPEG", exif=turned)).decode()
    answer = post(client, "/infer", task=SOFA, image=upright)
    assert (answer["width"], answer["height"]) == (60, 90)


def test_threshold_and_limit_select_boxes(client: httpx2.Client) -> None:
    every = post(client, "/infer", task=SOFA, image=IMAGE, **ALL)["boxes"]
    assert post(client, "/infer", task=SOFA, image=IMAGE, score_threshold=1.0)["boxes"] == []
    least = every[0]["score"]
    best = post(client, "/infer", task=SOFA, image=IMAGE, score_threshold=least)["boxes"]
    assert [box for box in every if box["score"] >= least] == best
    assert len(post(client, "/infer", task=SOFA, image=IMAGE, max_boxes=1, **ALL)["boxes"]) <= 1


def test_concurrent_requests_of_both_modalities_answer_as_they_do_alone(
    client: httpx2.Client,
) -> None:
    images = [base64.b64encode(draw_file(seed)).decode() for seed in range(3)]
    requests: list[dict[str, Any]] = [
        {**source, "image": image, **ALL}
        for image in images
        for source in ({"task": SOFA}, {"task": BIRD}, {"adapter_id": "base", "prompt": SOFA})
    ]
    requests += [{"task": RECIPE, "prompt": "x", "max_tokens": 8} for _ in range(3)]

    def answer(request: dict[str, Any]) -> Any:
        body = post(client, "/infer", **request)
        if "text" in body:
            return body["text"]
        return [(box["label"], [round(side, 1) for side in box["box"]]) for box in body["boxes"]]

    alone = [answer(request) for request in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        assert list(pool.map(answer, requests)) == alone


def test_adapter_of_the_other_modality_is_refused(client: httpx2.Client) -> None:
    text = post(client, "/generate-lora", task=RECIPE)["adapter_id"]
    detection = post(client, "/generate-lora", task=SOFA)["adapter_id"]
    for body, hint in (
        ({"adapter_id": text, "image": IMAGE}, "leave the `image` out"),
        ({"adapter_id": detection, "prompt": "x"}, "send an `image`"),
    ):
        response = client.post("/infer", json=body)
        assert (response.status_code, response.json()["code"]) == (422, "wrong_modality")
        assert hint in response.json()["detail"]
    assert refuse(client, "/infer", adapter_id="0" * 64, image=IMAGE) == (404, "adapter_not_found")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"adapter_id": "base", "prompt": SOFA, "image": "not base64!"}, "invalid_image"),
        ({"adapter_id": "base", "prompt": SOFA, "image": IMAGE[:400]}, "invalid_image"),
        ({"adapter_id": "base", "prompt": SOFA, "image": ""}, "invalid_image"),
        ({"task": SOFA, "image": base64.b64encode(b"%PDF-1.7").decode()}, "invalid_image"),
        ({"adapter_id": "base", "image": IMAGE}, "invalid_input"),  # nothing says what to detect
        ({"adapter_id": "base", "image": IMAGE, "prompt": "x " * 5000}, "invalid_input"),
        ({"task": SOFA, "image": IMAGE, "max_tokens": 5}, "invalid_request"),
        ({"task": SOFA, "image": IMAGE, "temperature": 0.0}, "invalid_request"),
        ({"task": SOFA, "prompt": "x", "render": True}, "invalid_request"),
        ({"task": SOFA, "image": IMAGE, "num_beams": 6}, "invalid_request"),
        ({"task": SOFA, "image": IMAGE, "max_boxes": 65}, "invalid_request"),
        ({"task": SOFA, "image": 5}, "invalid_request"),
        ({"task": SOFA, "image": IMAGE, "colour": "red"}, "invalid_request"),
    ],
)
def test_wrong_requests_are_refused(client: httpx2.Client, body: Any, code: str) -> None:
    assert refuse(client, "/infer", **body) == (422, code)


def test_too_many_pixels_or_bytes_are_refused(client: httpx2.Client) -> None:
    with io.BytesIO() as file:
        Image.new("L", (201, 200)).save(file, "PNG")
        large = base64.b64encode(file.getvalue()).decode()
    assert refuse(client, "/infer", task=SOFA, image=large) == (422, "invalid_image")
    with io.BytesIO() as file:
        Image.new("L", (150, 150)).save(file, "PNG")
        half = base64.b64encode(file.getvalue()).decode()
    assert refuse(client, "/generate-lora", images=[half, half]) == (422, "invalid_image")
    heavy = "A" * 1_000_001
    for path, body in (("/infer", {"image": heavy}), ("/generate-lora", {"images": [heavy]})):
        assert refuse(client, path, task=SOFA, **body) == (413, "body_too_large")
    form = client.post("/infer", data={"task": SOFA}, files={"image": bytes(1_000_001)})
    assert (form.status_code, form.json()["code"]) == (413, "body_too_large")
    deleted = client.request("DELETE", f"/v1/adapters/{'0' * 64}", content=bytes(300_000))
    assert deleted.status_code == 404  # reads no body


FORM = {"content-type": "multipart/form-data; boundary=x"}
PART = b'--x\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"", {"content-type": "multipart/form-data"}, 400),
        (b"", FORM, 422),
        (b"no form", FORM, 400),
        (PART % (b"task", b"x") + b"--x", FORM, 422),
        (PART % (b"prompt", b"x" * 300_000) + b"--x--", FORM, 400),
        (PART % (b"task", b"x") * 40 + b"--x--", FORM, 400),
        (PART % (b"task", b"x") * 2 + PART % (b"prompt", b"x") + b"--x--", FORM, 422),
        (PART % (b"mood", b"x") + b"--x--", FORM, 422),
        (
            PART % (b"task", b"\xff") + b"--x--",
            {"content-type": f"{FORM['content-type']}; charset=undefined"},
            400,
        ),
        (b"task=x&prompt=x", {"content-type": "application/x-www-form-urlencoded"}, 422),
        (b"x", {"content-type": "text/plain"}, 422),
        (b"{}", {}, 422),
        (b'{"task": ', {"content-type": "application/json"}, 422),
        (b'{"task": "\xff"}', {"content-type": "application/json"}, 422),
    ],
)
def test_unreadable_bodies_are_refused(
    client: httpx2.Client, content: bytes, headers: dict[str, str], status: int
) -> None:
    response = client.post("/infer", content=content, headers=headers)
    assert response.status_code == status, response.text
    assert response.json()["code"] == {400: "malformed_request", 422: "invalid_request"}[status]


def test_two_files_are_too_many(client: httpx2.Client) -> None:
    files = [("image", ("a.png", FILE, "image/png")), ("image", ("b.png", FILE, "image/png"))]
    response = client.post("/infer", data={"task": SOFA}, files=files)
    assert (response.status_code, response.json()["code"]) == (400, "malformed_request")


def test_example_images_describe_a_task(
    client: httpx2.Client, tiny_detection_bundle: TinyDetectionBundle
) -> None:
    images = [base64.b64encode(draw_file(seed)).decode() for seed in (1, 2)]
    adapter = post(client, "/generate-lora", images=images)
    assert (adapter["modality"], adapter["recipe"]["task"]) == ("detection", "")
    files = [draw_file(seed) for seed in (1, 2)]
    digest = tiny_detection_bundle.bundle.digest
    recipe = AdapterRecipe.build_from_images(files, bundle_digest=digest)
    assert adapter["adapter_id"] == recipe.adapter_id
    assert adapter["recipe"]["examples"] == recipe.examples
    assert adapter["recipe"]["encoder"].startswith("conse/")
    again = post(client, "/generate-lora", images=images)
    assert (again["cache"], again["vector_sha256"]) == ("hit", adapter["vector_sha256"])
    other = post(client, "/generate-lora", images=images[:1])
    assert other["vector_sha256"] != adapter["vector_sha256"]

    use = {"adapter_id": adapter["adapter_id"], "image": IMAGE, **ALL}
    assert refuse(client, "/infer", **use) == (422, "invalid_input")  # it has no words
    assert post(client, "/infer", prompt="Find the cat.", **use)["boxes"][0]["label"] == "cat"
    refused = client.post("/generate-lora", json={"images": [IMAGE, "x"]})
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_image")
    assert "images[1]" in refused.json()["detail"]
    assert refuse(client, "/generate-lora", images=[IMAGE], modality="text") == (
        422,
        "invalid_input",
    )


def test_adapters_of_both_bundles_are_listed_read_downloaded_and_deleted(
    client: httpx2.Client,
) -> None:
    adapters = [
        post(client, "/generate-lora", task=task, seed=9, mode="sample") for task in (RECIPE, SOFA)
    ]
    listed = client.get("/v1/adapters", params={"limit": 2}).json()["adapters"]
    assert [item["modality"] for item in listed] == ["detection", "text"]
    for adapter in adapters:
        path = f"/v1/adapters/{adapter['adapter_id']}"
        info = client.get(path).json()
        assert info == {key: adapter[key] for key in info}
        assert client.get(f"{path}/peft.zip").status_code == 200
        assert client.delete(path).status_code == 200
        assert client.get(path).status_code == 404


def test_metrics_tell_the_modalities_apart(client: httpx2.Client) -> None:
    refuse(client, "/infer", task=SOFA, image="?")
    text = client.get("/metrics").text
    for line in (
        'icm_lora_slots{modality="detection",state="total"} 8.0',
        'icm_lora_slots{modality="text",state="total"} 8.0',
        'icm_lora_queue_depth{modality="detection"} 0.0',
        'icm_lora_batch_rows_count{modality="detection"}',
        "icm_lora_detected_boxes_total",
        'icm_lora_image_rejections_total{reason="not_base64"}',
        'bundle="tiny-detection"',
        'bundle="tiny"',
    ):
        assert line in text, line


def test_interface_is_documented(client: httpx2.Client) -> None:
    document = client.get("/openapi.json").json()
    operation = document["paths"]["/infer"]["post"]
    content = operation["requestBody"]["content"]
    assert content["application/json"]["schema"]["$ref"].endswith("/InferRequest")
    form = content["multipart/form-data"]["schema"]["properties"]
    assert form["image"]["format"] == "binary"
    answers = json.dumps(operation["responses"]["200"])
    assert "/InferResponse" in answers
    assert "/DetectionResponse" in answers
    examples = operation["responses"]["422"]["content"]["application/problem+json"]["examples"]
    assert {"invalid_image", "wrong_modality", "invalid_request"} <= set(examples)
    names = set(document["components"]["schemas"])
    assert {"InferRequest", "Detection", "DetectionResponse"} <= names


def test_detection_alone_can_be_served(
    tiny_bundle: TinyBundle, tiny_detection_bundle: TinyDetectionBundle
) -> None:
    settings = make_both_settings(tiny_bundle, tiny_detection_bundle, bundle=None)
    with serve_in_thread(settings) as alone:
        assert post(alone, "/generate-lora", task=RECIPE)["modality"] == "detection"
        assert post(alone, "/infer", task=SOFA, image=IMAGE)["width"] == 90
        response = alone.post("/infer", json={"adapter_id": "base", "prompt": "x"})
        assert (response.status_code, response.json()["code"]) == (422, "wrong_modality")
        assert "ICM_LORA_BUNDLE" in response.json()["detail"]


def test_without_a_detection_bundle_images_are_refused(tiny_bundle: TinyBundle) -> None:
    with serve_in_thread(make_settings(tiny_bundle)) as alone:
        for path, body in (
            ("/infer", {"task": SOFA, "image": IMAGE}),
            ("/generate-lora", {"task": SOFA, "modality": "detection"}),
        ):
            response = alone.post(path, json=body)
            assert (response.status_code, response.json()["code"]) == (422, "wrong_modality")
            assert "ICM_LORA_DETECTION_BUNDLE" in response.json()["detail"]
        assert refuse(alone, "/generate-lora", images=[IMAGE]) == (422, "invalid_input")
        assert post(alone, "/generate-lora", task=SOFA)["modality"] == "text"


@pytest.mark.redis
def test_both_bundles_share_one_redis(
    tiny_bundle: TinyBundle,
    tiny_detection_bundle: TinyDetectionBundle,
    redis_server: RedisServer,
) -> None:
    settings = make_both_settings(
        tiny_bundle, tiny_detection_bundle, redis_url=redis_server.url, redis_timeout_seconds=5
    )
    with serve_in_thread(settings) as first:
        made = [post(first, "/generate-lora", task=task) for task in (RECIPE, SOFA)]
    with serve_in_thread(settings) as second:
        for adapter in made:
            found = post(second, "/generate-lora", task=adapter["recipe"]["task"])
            assert (found["cache"], found["vector_sha256"]) == ("hit", adapter["vector_sha256"])
            path = f"/v1/adapters/{adapter['adapter_id']}"
            assert second.get(path).json()["modality"] == adapter["modality"]
            assert found["degraded"] == []
        assert "icm_lora_redis_up 1.0" in second.get("/metrics").text


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"bundle": "detection", "detection_bundle": None}, "name it in ICM_LORA_DETECTION_BUNDLE"),
        ({"bundle": None, "detection_bundle": "text"}, "name it in ICM_LORA_BUNDLE"),
    ],
)
def test_bundle_of_the_other_modality_is_refused_at_the_start(
    tiny_bundle: TinyBundle,
    tiny_detection_bundle: TinyDetectionBundle,
    changes: dict[str, str | None],
    hint: str,
) -> None:
    folders = {"text": tiny_bundle.folder, "detection": tiny_detection_bundle.folder, None: None}
    named = {setting: folders[name] for setting, name in changes.items()}
    settings = make_settings(tiny_bundle, **named)
    metrics = ServiceMetrics(False)
    quotas = Quotas(settings, {}, metrics.on_rejection)
    with pytest.raises(InvalidBundleError, match=hint):
        asyncio.run(open_resources(settings, metrics, quotas))
