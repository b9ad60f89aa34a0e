"""Answers of the HTTP interface."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from service.adapters.distribution import DecisionKind

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

    task: Annotated[str, Field(description="Empty for a task by example alone.")]
    examples: Annotated[
        str, Field(description="sha256 of the example texts or images; empty without any.")
    ]
    encoder: Annotated[
        str, Field(description="What read the task.", examples=["open_clip_text/ViT-L-14/openai"])
    ]
    mode: str
    seed: int
    temperature: float
    strength: float
    refine_steps: Annotated[int, Field(description="Gradient steps with the example texts.")]


class RefinementInfo(BaseModel):
    """What gradient steps with the examples came to; their time is the stage `refine`."""

    steps: int
    loss_before: Annotated[
        float, Field(description="Nats a token of the examples with the adapter as generated.")
    ]
    loss_after: Annotated[
        float, Field(description="The same with this adapter; never more than before.")
    ]


class AdapterInfo(BaseModel):
    """An adapter and where it came from."""

    adapter_id: AdapterId
    modality: Modality
    recipe: Annotated[RecipeInfo | None, Field(description="Null for an upload.")]
    regenerable: Annotated[
        bool, Field(description="Whether the recipe alone makes it again once no cache holds it.")
    ]
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
        float | None,
        Field(description="How near the task lies to the training tasks, 0 to 1."),
    ]


class GenerateResponse(AdapterInfo):
    """A generated adapter, ready to answer."""

    decision: Annotated[DecisionKind, Field(description="What was done with the task.")]
    similarity: Annotated[
        float, Field(description="Cosine of the request's task vector to the nearest task's.")
    ]
    threshold: Annotated[
        float, Field(description="Least `in_distribution` of the words of a task.")
    ]
    cache: Annotated[
        Literal["hit", "miss", "coalesced", "degraded", "bypass"],
        Field(description="How the cache took part."),
    ]
    degraded: Annotated[
        list[str], Field(description="Components that are lost; the answer is right without them.")
    ]
    refinement: Annotated[
        RefinementInfo | None,
        Field(description="Null where this request refined nothing, also where a cache had it."),
    ]
    slot: Annotated[
        int | None,
        Field(
            description="Slot of the bank that holds the adapter; null where running requests held "
            "every slot: the adapter's first request loads it."
        ),
    ]
    generation: Annotated[
        int | None, Field(description="Number of this load into the bank; null without a slot.")
    ]
    milliseconds: Milliseconds


class UploadResponse(AdapterInfo):
    """An adapter that was uploaded."""

    degraded: Annotated[
        list[str], Field(description="Caches that did not take it: it may end with the process.")
    ]


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
    decision: Annotated[
        DecisionKind | None, Field(description="What was done with the `task`; null without one.")
    ] = None
    nearest_task: Annotated[
        str | None, Field(description="Training task nearest to the `task`.")
    ] = None
    in_distribution: Annotated[float | None, Field(description="Score of the `task`, 0 to 1.")] = (
        None
    )
    similarity: Annotated[
        float | None, Field(description="Cosine of the `task` to the nearest training task.")
    ] = None
    threshold: Annotated[
        float | None, Field(description="Least `in_distribution` of the words of a task.")
    ] = None


class AliasUse(BaseModel):
    """The alias that a request named, as it was when the request came."""

    name: str
    generation: int


class InferResponse(BaseModel):
    """A completion of a text."""

    text: str
    finish_reason: Annotated[
        Literal["stop", "length"],
        Field(description="`stop`: end of text or a stop text. `length`: `max_tokens` reached."),
    ]
    usage: Usage
    receipt: Receipt
    alias: Annotated[AliasUse | None, Field(description="Null where the request named none.")]
    cache: Annotated[
        Literal["hit", "miss", "coalesced", "degraded"] | None,
        Field(
            description="How the cache took part; null for an `adapter_id`, and for a pinned alias."
        ),
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
    alias: Annotated[AliasUse | None, Field(description="Null where the request named none.")]
    cache: Annotated[
        Literal["hit", "miss", "coalesced", "degraded"] | None,
        Field(
            description="How the cache took part; null for an `adapter_id`, and for a pinned alias."
        ),
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


class AliasInfo(BaseModel):
    """A name and the adapter that it stands for."""

    name: Annotated[str, Field(examples=["recipes-v2"])]
    adapter_id: AdapterId
    generation: Annotated[
        int, Field(description="1 at first, 1 more with every replacement, also after a deletion.")
    ]
    created_at: Annotated[datetime, Field(description="When this generation was made.")]
    expires_at: Annotated[datetime | None, Field(description="Null: never.")]
    pinned: Annotated[bool, Field(description="Its adapter stays in memory.")]
    regenerable: Annotated[
        bool,
        Field(description="Whether its adapter can be generated again once no cache holds it."),
    ]


class AliasState(AliasInfo):
    """An alias, and how far it can be relied on."""

    durable: Annotated[
        bool, Field(description="It lies in Redis: it outlives the process, and replicas share it.")
    ]
    degraded: Annotated[list[str], Field(description="Components that are lost.")]


class AliasList(BaseModel):
    """The caller's aliases, a page at a time."""

    aliases: list[AliasInfo]
    total: int
    durable: Annotated[bool, Field(description="As for one alias.")]
    degraded: Annotated[list[str], Field(description="Components that are lost.")]


class AliasDeletion(BaseModel):
    """A name that is free."""

    name: str
    adapter_id: Annotated[str, Field(description="What it stood for; the adapter stays.")]
    generation: Annotated[int, Field(description="Its last; the next alias of this name goes on.")]
