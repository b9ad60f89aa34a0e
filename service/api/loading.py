"""Start of the service: reads bundles, loads models, connects to Redis."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from service.adapters.alias_store import RedisAliasStore
from service.adapters.cache import AdapterCache, ProcessCache, RedisCache
from service.adapters.pins import Pins
from service.adapters.provider import AdapterProvider
from service.adapters.registry import AliasRegistry
from service.adapters.slot_bank import SlotBank
from service.adapters.validity import AdapterGates, ValidityGate, calibrate_gate
from service.api.bundle_service import BundleService
from service.api.modality_choice import ModalityChoice
from service.api.pictures import PictureReader
from service.api.quotas import Quotas
from service.api.resources import Resources
from service.api.schemas import Modality
from service.errors import InvalidBundleError
from service.inference.base_model import BUNDLED_BASE, BaseModel, load_base_model
from service.inference.detection import DetectionEngine
from service.inference.engine import AnswerT, Engine, RequestT
from service.inference.example_reader import ExampleReader
from service.inference.probe import capture_probe
from service.inference.refiner import Refiner
from service.inference.scheduler import Scheduler
from service.inference.text import TextEngine
from service.logs import quiet_transformers
from service.metrics import LoraRequests, ServiceMetrics
from service.settings import ENV_PREFIX, Settings
from service.synthesis.bundle import Bundle, read_bundle
from service.synthesis.layout import AdapterLayout
from service.synthesis.synthesizer import Synthesizer, build_synthesizer
from service.threads import release_workers, releasing

_SETTINGS: Mapping[Modality, str] = {"text": "BUNDLE", "detection": "DETECTION_BUNDLE"}
_ENGINES: Mapping[Modality, type[TextEngine | DetectionEngine]] = {
    "text": TextEngine,
    "detection": DetectionEngine,
}


@dataclass(frozen=True)
class _Models:
    """What a bundle needs in memory."""

    synthesizer: Synthesizer
    base: BaseModel
    gate: ValidityGate


async def open_resources(settings: Settings, metrics: ServiceMetrics, quotas: Quotas) -> Resources:
    """Loads the bundles, their encoders and base models, and starts the schedulers.

    Raises:
        InvalidBundleError: a bundle cannot be trusted, does not fit its base or encoder, or is
            of another modality than its setting.
        IcmLoraError: a base model or an encoder cannot be loaded.
    """
    models = await asyncio.to_thread(releasing(_load_models), settings)
    synthesizers = {modality: each.synthesizer for modality, each in models.items()}
    layouts = [each.bundle.layout for each in synthesizers.values()]
    redis, watch = await _open_redis(settings, metrics, layouts)
    process = ProcessCache(settings.process_cache_bytes)
    quotas.watch_adapters(process)
    metrics.watch_process_cache(process.__len__, process.size_bytes)
    gates = AdapterGates(
        {each.synthesizer.bundle.digest: each.gate for each in models.values()},
        metrics.on_adapter_rejected,
    )
    cache = AdapterCache(process, redis, metrics, gates.check)
    aliases = AliasRegistry(
        None if redis is None else RedisAliasStore(redis, redis.seal),
        Pins(settings.pinned_bytes, quotas.find_pinned_bytes),
    )
    metrics.watch_pinned(aliases.pins.count)
    services = {
        modality: _start_service(modality, each, cache, settings, metrics, quotas, aliases)
        for modality, each in models.items()
    }
    for service in services.values():
        cache.computations.use(service.scheduler.run_if_idle)
    release_workers()  # this thread serves HTTP from now on
    return Resources(
        settings,
        metrics,
        services.get("text"),
        services.get("detection"),
        ModalityChoice(synthesizers, cache.computations),
        PictureReader(settings.max_image_pixels, metrics),
        aliases,
        redis,
        watch,
    )


def _load_models(settings: Settings) -> dict[Modality, _Models]:
    if settings.torch_threads:
        torch.set_num_threads(settings.torch_threads)
    quiet_transformers()
    models: dict[Modality, _Models] = {}
    if settings.bundle is not None:
        models["text"] = _load_bundle("text", settings.bundle, settings.base, settings, None)
    if settings.detection_bundle is not None:
        first = models["text"].synthesizer if models else None
        models["detection"] = _load_bundle(
            "detection", settings.detection_bundle, settings.detection_base, settings, first
        )
    return models


def _load_bundle(
    modality: Modality,
    folder: Path,
    base_reference: str | None,
    settings: Settings,
    loaded: Synthesizer | None,
) -> _Models:
    bundle = _read_bundle(folder, modality)
    shares_encoder = loaded is not None and loaded.encoder.encoder_id == bundle.encoder_id
    encoder = loaded.encoder if loaded is not None and shares_encoder else None
    # On the CPU wherever the base is: replicas with and without a GPU make the same bytes.
    synthesizer = build_synthesizer(bundle, "cpu", encoder)
    reference = base_reference or bundle.base_reference
    base = load_base_model(
        reference,
        device=settings.device,
        dtype="auto" if reference == BUNDLED_BASE else settings.dtype,
        cache_dir=settings.cache_dir,
        bundle_folder=folder,
    )
    bundle.check_base(base.digest)
    if base.modality != modality:
        raise InvalidBundleError(
            f"bundle {bundle.name} is for {modality}, its base {base.reference} is not"
        )
    probe = capture_probe(base, bundle.layout)
    return _Models(synthesizer, base, calibrate_gate(synthesizer, probe))


def _read_bundle(folder: Path, modality: Modality) -> Bundle:
    bundle = read_bundle(folder)
    if bundle.modality != modality:
        right = {name: setting for name, setting in _SETTINGS.items() if name == bundle.modality}
        hint = f"name it in {ENV_PREFIX}{right.popitem()[1]}" if right else "train it again"
        raise InvalidBundleError(
            f"{ENV_PREFIX}{_SETTINGS[modality]} is for {modality}, bundle {bundle.name} "
            f"is for {bundle.modality}: {hint}"
        )
    return bundle


def _start_service(
    modality: Modality,
    models: _Models,
    cache: AdapterCache,
    settings: Settings,
    metrics: ServiceMetrics,
    quotas: Quotas,
    aliases: AliasRegistry,
) -> BundleService[Any, Any, Any]:
    bundle = models.synthesizer.bundle
    engine = _ENGINES[modality](
        models.base,
        bundle.layout,
        bundle.bases,
        num_slots=settings.num_slots,
        max_prompt_tokens=settings.max_prompt_tokens,
    )
    _watch_slots(modality, engine.slots, metrics)
    model_name = bundle.base_reference if modality == "text" else None  # vLLM's names are for it
    scheduler: Scheduler[Any, Any] = _start_scheduler(
        modality, engine, settings, metrics, aliases, model_name
    )
    read_texts = refine = None
    if bundle.examples is not None and isinstance(engine, TextEngine):
        between, deadline = scheduler.run_between_steps, settings.request_deadline_seconds
        read_texts = ExampleReader(engine, between).read
        refine = Refiner(engine, between, cache.computations, deadline).refine
    provider = AdapterProvider(
        models.synthesizer,
        cache,
        on_batch=metrics.on_generation_batch,
        reserve_bytes=quotas.reserve_bytes,
        read_texts=read_texts,
        refine=refine,
    )
    return BundleService(
        modality,
        settings,
        metrics,
        models.synthesizer,
        provider,
        engine,
        scheduler,
        quotas,
    )


def _watch_slots(modality: Modality, slots: SlotBank, metrics: ServiceMetrics) -> None:
    metrics.watch_slots(modality, lambda state: int(getattr(slots.stats(), state)))


def _start_scheduler(
    modality: Modality,
    engine: Engine[RequestT, AnswerT],
    settings: Settings,
    metrics: ServiceMetrics,
    aliases: AliasRegistry,
    model_name: str | None,
) -> Scheduler[RequestT, AnswerT]:
    observer = metrics.observe_batches(
        modality, model_name=model_name, max_rows=settings.max_batch_rows
    )
    scheduler = Scheduler(
        engine,
        max_queue=settings.max_queue,
        max_queue_work=settings.max_queue_tokens,
        max_batch_rows=settings.max_batch_rows,
        batch_window_seconds=settings.batch_window_seconds,
        observer=observer,
    )
    observer.watch_adapters(
        LoraRequests(
            max_lora=settings.max_batch_rows,
            running=scheduler.running_adapters,
            waiting=scheduler.waiting_adapters,
            names=aliases.index_names,
        )
    )
    scheduler.start()
    return scheduler


async def _open_redis(
    settings: Settings, metrics: ServiceMetrics, layouts: list[AdapterLayout]
) -> tuple[RedisCache, asyncio.Task[None]] | tuple[None, None]:
    url = settings.redis_url.get_secret_value()
    if not url:
        return None, None
    redis = RedisCache(
        url,
        *layouts,
        timeout_seconds=settings.redis_timeout_seconds,
        retry_seconds=settings.redis_retry_seconds,
        secret=settings.redis_secret.get_secret_value().encode(),
        lock_seconds=settings.redis_lock_seconds,
        on_state=metrics.on_redis_state,
        on_breaker=metrics.on_breaker_state,
        on_rejected=metrics.on_redis_value_rejected,
    )
    await redis.ping()
    return redis, asyncio.create_task(_watch_redis(redis, settings.redis_retry_seconds))


async def _watch_redis(redis: RedisCache, pause_seconds: float) -> None:
    """Keeps the state of Redis true while no request asks it."""
    while True:
        await asyncio.sleep(pause_seconds)
        await redis.ping()
