"""Requests of the HTTP interface; the limits below are part of the published API."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from service.adapters.distribution import OutOfDistribution
from service.synthesis.adapter_recipe import MAX_TASK_CHARACTERS
from service.synthesis.example_tasks import MAX_EXAMPLE_CHARACTERS, MAX_EXAMPLE_TEXTS
from service.synthesis.refinement import MAX_REFINE_STEPS

BASE_ADAPTER_ID = "base"
"""The only adapter id that is answered by the base model itself."""

MAX_PROMPT_CHARACTERS = 65_536
MAX_NEW_TOKENS = 1_024
MAX_STOPS = 8
MAX_STOP_CHARACTERS = 64
MAX_SEED = 2**63 - 1
MAX_TTL_SECONDS = 31_536_000
MAX_TEMPERATURE = 2.0
MAX_STRENGTH = 4.0
MAX_EXAMPLE_IMAGES = 16
MAX_BEAMS = 5
MAX_BOXES = 64

TEXT_FIELDS = ("max_tokens", "temperature", "top_p", "seed", "stop")
"""Fields of `/infer` that mean nothing with an image."""

IMAGE_FIELDS = ("render", "num_beams", "max_boxes", "score_threshold")
"""Fields of `/infer` that mean nothing without one."""

EXAMPLE_TASK = "Continue the text in the style of a cooking recipe."
_EXAMPLE_TEXT = "Apple crumble\n\nPreheat the oven to 180 C. Peel four apples and slice them."
EXAMPLE_DETECTION = "Detect the sofa in the image."
_EXAMPLE_IMAGE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4//8/AAX+Av4N70a4AAAAAElFTkSuQmCC"
)

TaskDescription = Annotated[
    str,
    Field(
        min_length=1,
        max_length=MAX_TASK_CHARACTERS,
        description="The task in words.",
        examples=[EXAMPLE_TASK],
    ),
]

OutOfDistributionPolicy = Annotated[
    OutOfDistribution | None,
    Field(
        description="What to do with a task that is unlike all training tasks: `reject` it (422), "
        "use the adapter of the `nearest` training task, answer with the `base` model, or "
        "`generate` its adapter anyway. The receipt tells what was done. Default: the service's."
    ),
]


class RequestModel(BaseModel):
    """A request body: unknown keys and numbers that are not finite are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class GenerateRequest(RequestModel):
    """A task in words, by example or both, and how to turn it into an adapter."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"task": EXAMPLE_TASK},
                {"task": EXAMPLE_TASK, "mode": "sample", "seed": 7, "ttl_seconds": 3600},
                {"task": EXAMPLE_DETECTION, "modality": "detection"},
                {"examples": [_EXAMPLE_TEXT], "modality": "text", "refine_steps": 2},
                {"images": [_EXAMPLE_IMAGE]},
            ]
        }
    )

    task: TaskDescription | None = None
    images: Annotated[
        list[str] | None,
        Field(
            min_length=1,
            max_length=MAX_EXAMPLE_IMAGES,
            description="Instead of `task`: pictures of what to detect, each a PNG, JPEG or WebP "
            "file in base64.",
        ),
    ] = None
    examples: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_EXAMPLE_CHARACTERS)]] | None,
        Field(
            min_length=1,
            max_length=MAX_EXAMPLE_TEXTS,
            description="Instead of `task` or beside it: texts like those to write, in any order. "
            "The base model reads the beginning of each. They are not kept.",
        ),
    ] = None
    modality: Annotated[
        Literal["text", "detection"] | None,
        Field(
            description="Which bundle generates. Default: the only one that is served, else the "
            "one whose training tasks lie nearest to the description."
        ),
    ] = None
    mode: Annotated[
        Literal["mode", "sample"],
        Field(
            description="`mode`: the most likely adapter (z = 0). `sample`: z ~ N(0, I) drawn from "
            "`seed`, scaled by `temperature`."
        ),
    ] = "mode"
    seed: Annotated[int, Field(ge=0, le=MAX_SEED, description="Seed of mode `sample`.")] = 0
    temperature: Annotated[
        float, Field(gt=0, le=MAX_TEMPERATURE, description="Scale of z in mode `sample`.")
    ] = 1.0
    strength: Annotated[
        float, Field(gt=0, le=MAX_STRENGTH, description="Scale of the adapter's update.")
    ] = 1.0
    refine_steps: Annotated[
        int,
        Field(
            ge=0,
            le=MAX_REFINE_STEPS,
            description="Gradient steps with `examples`, on the few numbers from which the "
            "decoder makes the adapter: so that the base predicts the examples better. A step "
            "takes a second or two on two CPU cores; running requests go on meanwhile.",
        ),
    ] = 0
    ttl_seconds: Annotated[
        int | None,
        Field(ge=1, le=MAX_TTL_SECONDS, description="Time in the cache; default: the service's."),
    ] = None
    cache: Annotated[
        Literal["use", "bypass", "only"],
        Field(
            description="`use` the cache; `bypass` it and generate anew; `only` take what is "
            "cached, else 404."
        ),
    ] = "use"

    out_of_distribution: OutOfDistributionPolicy = None

    @model_validator(mode="after")
    def _check_one_source(self) -> "GenerateRequest":
        if self.images is not None and (self.task is not None or self.examples is not None):
            raise ValueError("leave out `task` and `examples`: `images` stand alone")
        if self.task is None and self.examples is None and self.images is None:
            raise ValueError("give a `task`, `examples`, both, or `images`")
        if self.refine_steps and self.examples is None:
            raise ValueError("give `examples` to refine with, or leave out `refine_steps`")
        return self


class InferRequest(RequestModel):
    """A prompt or an image, and the adapter (or the task to generate one for) that answers."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"task": EXAMPLE_TASK, "prompt": "Preheat the oven to", "max_tokens": 32},
                {"adapter_id": BASE_ADAPTER_ID, "prompt": "Preheat the oven to"},
                {"task": EXAMPLE_DETECTION, "image": _EXAMPLE_IMAGE, "render": True},
            ]
        }
    )

    task: Annotated[
        TaskDescription | None,
        Field(description="Generate where it is not cached (scope `generate`), then answer."),
    ] = None
    adapter_id: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=64,
            description=f"An adapter's id, or `{BASE_ADAPTER_ID}` for the base model itself.",
        ),
    ] = None
    alias: Annotated[
        str | None,
        Field(min_length=1, max_length=64, description="A name: see `PUT /v1/aliases/{name}`."),
    ] = None
    prompt: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=MAX_PROMPT_CHARACTERS,
            description="Text to continue. With an image: what to detect; default: the task.",
            examples=["Preheat the oven to"],
        ),
    ] = None
    image: Annotated[
        str | bytes | None,
        WithJsonSchema(
            {
                "anyOf": [{"type": "string", "contentEncoding": "base64"}, {"type": "null"}],
                "default": None,
            }
        ),
        Field(
            description="Picture to detect in: a PNG, JPEG or WebP file, in base64 (also as a "
            "`data:` URL) or as a file of a form. With it the answer is boxes."
        ),
    ] = None
    max_tokens: Annotated[
        int, Field(ge=1, le=MAX_NEW_TOKENS, description="Most tokens to generate.")
    ] = 64
    temperature: Annotated[
        float, Field(ge=0, le=MAX_TEMPERATURE, description="0 is greedy decoding.")
    ] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1, description="Nucleus sampling mass.")] = 1.0
    seed: Annotated[int, Field(ge=0, le=MAX_SEED, description="Seed of sampling.")] = 0
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]],
        Field(max_length=MAX_STOPS, description="Texts that end the completion, not included."),
    ] = []
    render: Annotated[
        bool, Field(description="With an image: return it with the boxes drawn, too.")
    ] = False
    num_beams: Annotated[
        int, Field(ge=1, le=MAX_BEAMS, description="With an image: width of the beam search.")
    ] = 1
    max_boxes: Annotated[
        int, Field(ge=1, le=MAX_BOXES, description="With an image: most boxes to find.")
    ] = 16
    score_threshold: Annotated[
        float, Field(ge=0, le=1, description="With an image: least score of a box.")
    ] = 0.05

    out_of_distribution: OutOfDistributionPolicy = None

    @model_validator(mode="after")
    def _check_one_source(self) -> "InferRequest":
        if sum(each is not None for each in (self.task, self.adapter_id, self.alias)) != 1:
            raise ValueError("give exactly one of `task`, `adapter_id` and `alias`")
        return self

    @model_validator(mode="after")
    def _check_modality(self) -> "InferRequest":
        misplaced = IMAGE_FIELDS if self.image is None else TEXT_FIELDS
        sent = [f"`{name}`" for name in misplaced if name in self.model_fields_set]
        if sent:
            place = "without" if self.image is None else "with"
            raise ValueError(f"leave out {', '.join(sent)}: without meaning {place} an image")
        if self.image is None and self.prompt is None:
            raise ValueError("give a `prompt` to continue, or an `image` to detect in")
        return self


_FileSchema = WithJsonSchema({"type": "string", "contentEncoding": "base64"})


class UploadRequest(RequestModel):
    """A LoRA that was trained elsewhere, as the two files of a PEFT directory."""

    config: Annotated[
        str | bytes,
        _FileSchema,
        Field(description="`adapter_config.json`: in base64, or as a file of a form."),
    ]
    weights: Annotated[
        str | bytes,
        _FileSchema,
        Field(description="`adapter_model.safetensors`: in base64, or as a file of a form."),
    ]
    modality: Annotated[
        Literal["text", "detection"] | None,
        Field(description="Whose base it is for. Default: text where it is served."),
    ] = None
    ttl_seconds: Annotated[
        int | None,
        Field(ge=1, le=MAX_TTL_SECONDS, description="Time in the cache; default: the service's."),
    ] = None


class AliasRequest(RequestModel):
    """The adapter that a name shall stand for: one that is known, or a task's."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"task": EXAMPLE_TASK, "pinned": True},
                {"task": EXAMPLE_TASK, "expected_generation": 3, "ttl_seconds": 3600},
            ]
        }
    )

    task: Annotated[TaskDescription | None, Field(description="Generate its adapter.")] = None
    adapter_id: Annotated[
        str | None, Field(min_length=1, max_length=64, description="An adapter's id.")
    ] = None
    modality: Annotated[
        Literal["text", "detection"] | None,
        Field(description="With a `task`: which bundle generates, as in `/generate-lora`."),
    ] = None
    expected_generation: Annotated[
        int | None,
        Field(
            ge=0,
            le=MAX_SEED,
            description="Refuse with 409 where the alias has another; 0: where it exists.",
        ),
    ] = None
    pinned: Annotated[bool, Field(description="Keep the adapter in this process's memory.")] = False
    ttl_seconds: Annotated[
        int | None,
        Field(ge=1, le=MAX_TTL_SECONDS, description="Lifetime of the alias; default: no end."),
    ] = None

    @model_validator(mode="after")
    def _check_one_source(self) -> "AliasRequest":
        if (self.task is None) == (self.adapter_id is None):
            raise ValueError("give exactly one of `task` and `adapter_id`")
        if self.modality is not None and self.task is None:
            raise ValueError("leave out `modality`: an adapter has its own")
        return self
