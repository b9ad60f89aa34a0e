"""From our own types to the models of the HTTP interface."""

from collections.abc import Mapping

from service.adapters.record import AdapterRecord
from service.api.schemas import AdapterInfo, BundleInfo, NearestTaskInfo, RecipeInfo
from service.synthesis.bundle import Bundle

MAX_NEAREST_TASKS = 5


def build_bundle_info(bundle: Bundle) -> BundleInfo:
    """Name, version and digest."""
    return BundleInfo(name=bundle.name, version=bundle.version, digest=bundle.digest)


def build_adapter_info(record: AdapterRecord, bundle: Bundle) -> AdapterInfo:
    """Facts about an adapter; `bundle` made it."""
    recipe, layout = record.recipe, bundle.layout
    return AdapterInfo(
        adapter_id=record.adapter_id,
        recipe=RecipeInfo(
            task=recipe.task,
            mode=recipe.mode.value,
            seed=recipe.seed,
            temperature=recipe.temperature,
            strength=recipe.strength,
        ),
        bundle=build_bundle_info(bundle),
        kind=layout.kind.value,
        rank=layout.rank,
        alpha=layout.alpha,
        target_modules=list(layout.roles),
        num_params=layout.num_params,
        size_bytes=record.size_bytes,
        vector_sha256=record.vector_sha256,
        nearest=[
            NearestTaskInfo(name=task.name, similarity=task.similarity)
            for task in record.nearest[:MAX_NEAREST_TASKS]
        ],
        in_distribution=record.in_distribution,
    )


def to_milliseconds(seconds: Mapping[str, float], total_seconds: float) -> dict[str, float]:
    """Stages and their total in milliseconds, to the microsecond."""
    stages = {**seconds, "total": total_seconds}
    return {stage: round(value * 1000, 3) for stage, value in stages.items()}
