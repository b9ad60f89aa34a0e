"""Answers of the HTTP interface."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

_EXAMPLE_ID = "5f0c" * 16

Modality = Annotated[
    Literal["text", "detection"],
    Field(description="What the adapter's base answers with: text, or boxes in an image."),
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

    task: Annotated[str, Field(description="Empty for a task by example.")]
    examples: Annotated[
        str, Field(description="sha256 of the example images; empty for a task in words.")
    ]
    encoder: Annotated[
        str, Field(description="What read the task.", examples=["open_clip_text/ViT-L-14/openai"])
    ]
    mode: str
    seed: int
    temperature: float
    strength: float


class AdapterInfo(BaseModel):
    """An adapter and where it came from."""

    adapter_id: AdapterId
    modality: Modality
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
    """A completion of a text."""

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


class Detection(BaseModel):
    """One object in an image."""

    box: Annotated[
        tuple[float, float, float, float],
        Field(
            description="Left, top, right, bottom in pixels of the image, turned upright.",
            examples=[[24.0, 60.5, 310.2, 227.9]],
        ),
    ]
    label: Annotated[str, Field(examples=["sofa"])]
    score: Annotated[float, Field(description="Confidence, 0 to 1.", examples=[0.87])]


class DetectionResponse(BaseModel):
    """What was found in an image."""

    boxes: Annotated[list[Detection], Field(description="By falling score.")]
    width: Annotated[int, Field(description="Of the image in pixels, turned upright.")]
    height: Annotated[int, Field(description="Of the image in pixels, turned upright.")]
    rendered_png: Annotated[
        str | None,
        Field(
            description="The image with the boxes drawn, a PNG in base64, large images made "
            "smaller; null unless `render` asked for it."
        ),
    ]
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
