"""Requests and answers of the HTTP interface; the limits below are part of the published API."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.synthesis.synthesizer import MAX_TASK_CHARACTERS

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

EXAMPLE_TASK = "Continue the text in the style of a cooking recipe."
_EXAMPLE_ID = "5f0c" * 16

TaskDescription = Annotated[
    str,
    Field(
        min_length=1,
        max_length=MAX_TASK_CHARACTERS,
        description="The task in words.",
        examples=[EXAMPLE_TASK],
    ),
]
AdapterId = Annotated[
    str,
    Field(description="sha256 of the adapter's recipe, hexadecimal.", examples=[_EXAMPLE_ID]),
]
Milliseconds = Annotated[
    dict[str, float],
    Field(
        description="Time per stage in milliseconds, and `total`.",
        examples=[{"encode": 9.1, "decode": 14.2, "total": 25.9}],
    ),
]


class RequestModel(BaseModel):
    """A request body: unknown keys and numbers that are not finite are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class GenerateRequest(RequestModel):
    """A task description, and how to turn it into an adapter."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"task": EXAMPLE_TASK},
                {"task": EXAMPLE_TASK, "mode": "sample", "seed": 7, "ttl_seconds": 3600},
            ]
        }
    )

    task: TaskDescription
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


class InferRequest(RequestModel):
    """A prompt, and the adapter (or the task to generate one for) that completes it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"task": EXAMPLE_TASK, "prompt": "Preheat the oven to", "max_tokens": 32},
                {"adapter_id": BASE_ADAPTER_ID, "prompt": "Preheat the oven to"},
            ]
        }
    )

    task: Annotated[TaskDescription | None, Field(description="Generate, then answer.")] = None
    adapter_id: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=64,
            description=f"An adapter's id, or `{BASE_ADAPTER_ID}` for the base model itself.",
        ),
    ] = None
    prompt: Annotated[
        str,
        Field(
            min_length=1,
            max_length=MAX_PROMPT_CHARACTERS,
            description="Text to continue.",
            examples=["Preheat the oven to"],
        ),
    ]
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

    @model_validator(mode="after")
    def _check_one_source(self) -> "InferRequest":
        if (self.task is None) == (self.adapter_id is None):
            raise ValueError("give exactly one of `task` and `adapter_id`")
        return self


class BundleInfo(BaseModel):
    """The generator that made an adapter."""

    name: Annotated[str, Field(examples=["text-smollm2"])]
    version: Annotated[str, Field(examples=["1.0.0"])]
    digest: Annotated[str, Field(description="sha256 of the bundle.", examples=["ab12" * 16])]


class NearestTaskInfo(BaseModel):
    """A training task near the description."""

    name: Annotated[str, Field(examples=["recipes"])]
    similarity: Annotated[float, Field(description="Cosine of the task vectors, -1 to 1.")]


class RecipeInfo(BaseModel):
    """Everything that determines an adapter, after normalisation."""

    task: TaskDescription
    mode: str
    seed: int
    temperature: float
    strength: float


class AdapterInfo(BaseModel):
    """An adapter and where it came from."""

    adapter_id: AdapterId
    recipe: RecipeInfo
    bundle: BundleInfo
    kind: Annotated[str, Field(description="Parameterisation.", examples=["core"])]
    rank: int
    alpha: float
    target_modules: Annotated[
        list[str], Field(description="Adapted modules.", examples=[["q_proj", "v_proj"]])
    ]
    num_params: Annotated[int, Field(description="Numbers in the adapter vector.")]
    size_bytes: Annotated[int, Field(description="Size of the adapter vector in bytes.")]
    vector_sha256: Annotated[str, Field(description="sha256 of the adapter vector's bytes.")]
    nearest: Annotated[list[NearestTaskInfo], Field(description="Nearest training tasks.")]
    in_distribution: Annotated[
        float, Field(description="How near the description lies to the training tasks, 0 to 1.")
    ]


class GenerateResponse(AdapterInfo):
    """A generated adapter, resident in a slot and ready to answer."""

    cache: Annotated[
        Literal["hit", "miss", "coalesced", "degraded", "bypass"],
        Field(description="How the cache took part."),
    ]
    degraded: Annotated[
        list[str], Field(description="Components that are lost; the answer is right without them.")
    ]
    slot: Annotated[int, Field(description="Slot of the bank that holds the adapter.")]
    generation: Annotated[int, Field(description="Number of this load into the bank.")]
    milliseconds: Milliseconds


class AdapterList(BaseModel):
    """Adapters known to this process, a page at a time."""

    adapters: list[AdapterInfo]
    total: Annotated[int, Field(description="Adapters known to this process.")]


class AdapterDeletion(BaseModel):
    """An adapter that is gone."""

    adapter_id: AdapterId
    degraded: Annotated[
        list[str], Field(description="Caches that could not be asked and may still hold it.")
    ]


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Receipt(BaseModel):
    """What answered: proof that the adapter, and not the base, was in the forward pass."""

    adapter_id: Annotated[str, Field(description="Adapter's id, or `base`.")]
    vector_sha256: Annotated[str | None, Field(description="Null for the base.")]
    slot: Annotated[int, Field(description="Slot that answered; 0 is the base.")]
    generation: Annotated[int, Field(description="Number of the slot's load; 0 for the base.")]
    bundle: BundleInfo


class InferResponse(BaseModel):
    """A completion."""

    text: str
    finish_reason: Annotated[
        Literal["stop", "length"],
        Field(description="`stop`: end of text or a stop text. `length`: `max_tokens` reached."),
    ]
    usage: Usage
    receipt: Receipt
    cache: Annotated[
        Literal["hit", "miss", "coalesced", "degraded"] | None,
        Field(description="How the cache took part; null for an `adapter_id`."),
    ]
    degraded: Annotated[list[str], Field(description="Components that are lost.")]
    milliseconds: Milliseconds


class Liveness(BaseModel):
    """The process runs."""

    status: Literal["live"]


class Readiness(BaseModel):
    """The service takes requests."""

    status: Literal["ready"]
    degraded: Annotated[list[str], Field(description="Components that are lost.")]


class FieldProblem(BaseModel):
    """One thing that is wrong in a request."""

    location: Annotated[str, Field(examples=["body.max_tokens"])]
    message: Annotated[str, Field(examples=["Input should be greater than or equal to 1"])]
    type: Annotated[str, Field(examples=["greater_than_equal"])]


class Problem(BaseModel):
    """Problem details (RFC 9457)."""

    type: Annotated[str, Field(description="URI of the class of problem.")]
    title: str
    status: int
    detail: Annotated[str, Field(description="What happened and what to change.")]
    instance: Annotated[str, Field(description="Path of the request.")]
    code: Annotated[str, Field(description="Stable machine-readable code.")]
    request_id: Annotated[str | None, Field(description="Id for the service's operator.")] = None
    errors: Annotated[
        list[FieldProblem] | None, Field(description="Only for invalid requests.")
    ] = None
