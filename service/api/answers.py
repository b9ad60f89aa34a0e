"""From our own types to the models of the HTTP interface."""

from collections.abc import Mapping

from service.adapters.alias import Alias
from service.adapters.distribution import Decision
from service.adapters.record import AdapterRecord
from service.api.bundle_service import AnyService
from service.api.requests import BASE_ADAPTER_ID
from service.api.schemas import (
    AdapterInfo,
    AliasUse,
    BundleInfo,
    NearestTaskInfo,
    Receipt,
    RecipeInfo,
    RefinementInfo,
)
from service.synthesis.adapter_recipe import AdapterRecipe
from service.synthesis.bundle import Bundle
from service.synthesis.refinement import Refined
from service.synthesis.synthesizer import Synthesizer

MAX_NEAREST_TASKS = 5


def build_bundle_info(bundle: Bundle) -> BundleInfo:
    """Name, version and digest."""
    return BundleInfo(name=bundle.name, version=bundle.version, digest=bundle.digest)


def build_alias_use(alias: Alias | None) -> AliasUse | None:
    """Name and generation."""
    return None if alias is None else AliasUse(name=alias.name, generation=alias.generation)


def build_receipt(
    record: AdapterRecord | None,
    bundle: Bundle,
    slot: int,
    generation: int,
    decision: Decision | None = None,
) -> Receipt:
    """What answered; no record is the base, no decision an adapter that was named."""
    return Receipt(
        adapter_id=BASE_ADAPTER_ID if record is None else record.adapter_id,
        vector_sha256=None if record is None else record.vector_sha256,
        slot=slot,
        generation=generation,
        bundle=build_bundle_info(bundle),
        decision=None if decision is None else decision.kind,
        nearest_task=None if decision is None else decision.nearest.name,
        in_distribution=None if decision is None else decision.in_distribution,
        similarity=None if decision is None else decision.nearest.similarity,
        threshold=None if decision is None else decision.threshold,
    )


def build_adapter_info(record: AdapterRecord, service: AnyService) -> AdapterInfo:
    """Facts about an adapter; `service` made it."""
    recipe, bundle = record.recipe, service.bundle
    layout = bundle.layout
    return AdapterInfo(
        adapter_id=record.adapter_id,
        modality=service.modality,
        recipe=None
        if recipe is None
        else RecipeInfo(
            task=recipe.task,
            examples=recipe.examples,
            encoder=_name_encoder(service.synthesizer, recipe),
            mode=recipe.mode.value,
            seed=recipe.seed,
            temperature=recipe.temperature,
            strength=recipe.strength,
            refine_steps=recipe.refine_steps,
        ),
        regenerable=record.regenerable,
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


def build_refinement_info(refined: Refined | None) -> RefinementInfo | None:
    """What the steps came to."""
    if refined is None:
        return None
    return RefinementInfo(
        steps=refined.steps, loss_before=refined.loss_before, loss_after=refined.loss_after
    )


def _name_encoder(synthesizer: Synthesizer, recipe: AdapterRecipe) -> str:
    """What read the task; of words with examples, both."""
    by_example = synthesizer.example_tasks or synthesizer.image_encoder
    names = [synthesizer.encoder.encoder_id] if recipe.task else []
    if recipe.examples and by_example is not None:
        names.append(by_example.encoder_id)
    return " + ".join(names)


def to_milliseconds(seconds: Mapping[str, float], total_seconds: float) -> dict[str, float]:
    """Stages and their total in milliseconds, to the microsecond."""
    stages = {**seconds, "total": total_seconds}
    return {stage: round(value * 1000, 3) for stage, value in stages.items()}
