"""`icm-lora demo`: a task in words becomes an adapter, seen from outside over HTTP."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from service.errors import NotReadyError

DETECTION_TASK = "Spot the sofas in this scene."
DETECTION_IMAGE = Path(__file__).parent / "bundles" / "detection-embedded" / "example.png"
DETECTION_OUT = Path("runs") / "demo" / "detection.png"

TASK = "Carry on the way a cookbook would."
PROMPT = "Grandmother's apple pie\n\n"
MAX_TOKENS = 60
EXAMPLES = (
    "Tomato soup\n\n2 lb ripe tomatoes\n1 onion, chopped\n2 cups stock\n\n"
    "Cook the onion in butter. Add the tomatoes and the stock and simmer for 30 minutes.",
    "Plum tart\n\n1 cup flour\n1/2 cup butter\n12 plums, halved\n\n"
    "Roll out the dough and line a pan with it. Arrange the plums and bake until golden.",
)
SHOWN_SCORE = 0.3
START_TIMEOUT_SECONDS = 300
SHOWN_METRICS = (
    "icm_lora_adapters_generated_total",
    "icm_lora_cache_lookups_total",
    "icm_lora_slots",
    "icm_lora_generated_tokens_total",
    "icm_lora_detected_boxes_total",
)


def run_demo() -> int:
    """Starts the service, asks it with and without an adapter, prints both, stops it."""
    with running_service() as url:
        _print_heading(f"POST /generate-lora  {TASK!r}")
        adapter = post_json(url, "/generate-lora", {"task": TASK})
        _print_fields({**adapter, "nearest": adapter["nearest"][:3]})
        again = post_json(url, "/generate-lora", {"task": TASK})
        print(f"\nagain: cache {again['cache']}, {again['milliseconds']['total']:.1f} ms")
        _print_heading(f"POST /generate-lora  {len(EXAMPLES)} examples instead of words")
        shown = post_json(url, "/generate-lora", {"examples": EXAMPLES})
        _print_fields({**shown, "nearest": shown["nearest"][:3]})
        for adapter_id in ("base", adapter["adapter_id"]):
            _print_heading(f"POST /infer  adapter_id {adapter_id[:12]}  prompt {PROMPT!r}")
            request = {"adapter_id": adapter_id, "prompt": PROMPT, "max_tokens": MAX_TOKENS}
            answer = post_json(url, "/infer", request)
            print(answer["text"].strip())
            seconds = answer["milliseconds"]["total"] / 1000
            tokens = answer["usage"]["completion_tokens"]
            print(f"\n{tokens} tokens in {seconds:.2f} s; receipt:")
            _print_fields(answer["receipt"])
        _show_detection(url)
        _print_heading("GET /metrics")
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        print("\n".join(line for line in lines if line.startswith(SHOWN_METRICS)))
    return 0


def _show_detection(url: str) -> None:
    """The same picture before and after: base model, then the adapter of a task in words."""
    image = base64.b64encode(DETECTION_IMAGE.read_bytes()).decode()
    pictures = []
    requests: tuple[tuple[str, dict[str, Any]], ...] = (
        ("adapter_id base", {"adapter_id": "base", "prompt": DETECTION_TASK}),
        (f"task {DETECTION_TASK!r}", {"task": DETECTION_TASK}),
    )
    for title, request in requests:
        _print_heading(f"POST /infer  {title}  image {DETECTION_IMAGE.name}")
        body = {**request, "image": image, "render": True, "score_threshold": SHOWN_SCORE}
        answer = post_json(url, "/infer", body)
        for found in answer["boxes"]:
            print(f"  {found['label']:<12} {found['score']:.2f}  {found['box']}")
        print(f"{len(answer['boxes'])} boxes in {answer['milliseconds']['total']:.0f} ms; receipt:")
        _print_fields(answer["receipt"])
        pictures.append(Image.open(io.BytesIO(base64.b64decode(answer["rendered_png"]))))
    width, height = pictures[0].size
    both = Image.new("RGB", (2 * width + 8, height), "white")
    for column, picture in enumerate(pictures):
        both.paste(picture, (column * (width + 8), 0))
    DETECTION_OUT.parent.mkdir(parents=True, exist_ok=True)
    both.save(DETECTION_OUT)
    print(f"before and after: {DETECTION_OUT}")


def find_free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_service(settings: Mapping[str, str] | None = None) -> Iterator[str]:
    """The service as a process on a free port, with settings on top of the environment's.

    It is stopped whatever happens in the block.

    Raises:
        NotReadyError: it ended, or was not ready in time.
    """
    port = str(find_free_port())
    environment = {"ICM_LORA_LOG_LEVEL": "warning", **os.environ, **(settings or {})}
    environment["ICM_LORA_PORT"] = port
    url = f"http://127.0.0.1:{port}"
    print(f"starting the service on {url} (the first start unpacks the base model) ...")
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "service"], env=environment)
    try:
        while not _is_ready(url):
            if process.poll() is not None:
                raise NotReadyError(f"the service ended with status {process.returncode}")
            if time.perf_counter() - started > START_TIMEOUT_SECONDS:
                raise NotReadyError(f"not ready within {START_TIMEOUT_SECONDS} s")
            time.sleep(0.2)
        print(f"ready after {time.perf_counter() - started:.1f} s")
        yield url
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health/ready", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def post_json(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Posts JSON and reads the JSON answer.

    Raises:
        NotReadyError: the service answered with an error.
    """
    request = urllib.request.Request(
        url + path,
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            answer: dict[str, Any] = json.load(response)
            return answer
    except urllib.error.HTTPError as error:
        raise NotReadyError(f"{path} answered {error.code}: {error.read().decode()}") from error


def _print_heading(text: str) -> None:
    print(f"\n--- {text}")


def _print_fields(body: dict[str, Any]) -> None:
    """One line a field; digests are cut to their first twelve digits."""
    for name, value in body.items():
        if name == "bundle":
            value = f"{value['name']} {value['version']} ({value['digest'][:12]})"
        elif name in ("adapter_id", "vector_sha256") and value:
            value = value[:12]
        elif name == "nearest":
            value = {task["name"]: round(task["similarity"], 3) for task in value}
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        print(f"  {name:<16} {text}")
