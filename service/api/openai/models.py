"""What a request may name as its `model`, and the adapter that this stands for."""

from service.adapters.distribution import OutOfDistribution
from service.api.auth import Principal
from service.api.bundle_service import TextService
from service.api.openai.errors import ModelNotFoundError
from service.api.openai.responses import ModelCard, ModelList
from service.api.resources import Resources
from service.api.sources import TASK_PREFIX, Source, parse_model, resolve_adapter
from service.errors import AdapterNotFoundError, AliasNotFoundError, WrongModalityError

OWNER = "icm-lora"
_MAX_SHOWN = 80


async def resolve_model(
    model: str,
    resources: Resources,
    service: TextService,
    principal: Principal,
    out_of_distribution: OutOfDistribution | None = None,
) -> Source:
    """What a model's name stands for.

    Raises:
        ModelNotFoundError: nothing, or an adapter of another modality.
        IcmLoraError: an adapter cannot be generated.
    """
    selector = parse_model(model, service.bundle.base_reference, out_of_distribution)
    try:
        return await resolve_adapter(selector, resources, service, principal)
    except (AdapterNotFoundError, AliasNotFoundError, WrongModalityError):
        raise ModelNotFoundError(
            f"no model {model[:_MAX_SHOWN]!r}: name the base, an alias, an adapter's id, or "
            f"`{TASK_PREFIX}` and a task in words"
        ) from None


async def list_models(
    resources: Resources, service: TextService, principal: Principal, created: int
) -> ModelList:
    """Cards of the base, of the caller's aliases, and of its adapters in this process.

    Adapters stand in the order of their last use, the most recent first.
    """
    base = service.bundle.base_reference
    cards = [_build_base_card(base, base, created)]
    cards += [
        _build_card(alias.name, alias.adapter_id, base, int(alias.created_at))
        for alias in (await resources.aliases.list(principal.tenant)).aliases
        if alias.recipe is None or alias.recipe.bundle_digest == service.bundle.digest
    ]
    cards += [
        _build_card(record.adapter_id, record.adapter_id, base, created)
        for record, maker in resources.list_adapters(principal)
        if maker is service
    ]
    return ModelList(data=cards)


async def read_model(
    model: str, resources: Resources, service: TextService, principal: Principal, created: int
) -> ModelCard:
    """The card of one model.

    Raises:
        ModelNotFoundError: no such model; `task:` and words are none before they are generated.
    """
    base = service.bundle.base_reference
    selector = parse_model(model, base)
    if selector.base:
        return _build_base_card(model, base, created)
    if selector.task is not None:
        raise ModelNotFoundError(
            f"`{TASK_PREFIX}...` has no card: complete with it, and `icm_lora` tells its adapter"
        )
    if selector.alias is not None:
        cards = (await list_models(resources, service, principal, created)).data
        for card in cards:
            if card.id == model:
                return card
    record = (await resolve_model(model, resources, service, principal)).record
    assert record is not None, "the base was looked for above"
    return _build_card(model, record.adapter_id, base, created)


def _build_base_card(name: str, base: str, created: int) -> ModelCard:
    return ModelCard(id=name, created=created, owned_by=OWNER, root=base, parent=None)


def _build_card(name: str, adapter_id: str, base: str, created: int) -> ModelCard:
    return ModelCard(id=name, created=created, owned_by=OWNER, root=adapter_id, parent=base)
