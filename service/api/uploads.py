"""Adapters that come in a request, as files: never as paths or addresses."""

import asyncio
import base64
import binascii

from service.adapters.peft_import import read_peft_upload
from service.adapters.record import AdapterRecord
from service.api.auth import Principal
from service.api.bundle_service import AnyService
from service.api.requests import UploadRequest
from service.api.resources import Resources
from service.api.schemas import Modality
from service.errors import InvalidInputError
from service.threads import releasing


async def admit_upload(
    body: UploadRequest, resources: Resources, principal: Principal
) -> tuple[AdapterRecord, AnyService, bool]:
    """Reads, checks and caches an uploaded adapter.

    Returns:
        The adapter, the service whose base it is for, and whether Redis did not take it.

    Raises:
        InvalidInputError: a file is not base64.
        InvalidAdapterError: the adapter does not fit, or may not serve.
        QuotaExceededError: the tenant has no room for it.
        WrongModalityError: no such bundle is served.
    """
    default: Modality = "text" if resources.text is not None else "detection"
    service = resources.need(body.modality or default)
    bundle = service.bundle
    config, weights = _read_file("config", body.config), _read_file("weights", body.weights)
    vector = await asyncio.to_thread(
        releasing(read_peft_upload), config, weights, bundle.layout, bundle.bases
    )
    record = AdapterRecord.from_upload(
        vector, bundle.layout, tenant=principal.tenant, bundle_digest=bundle.digest
    )
    ttl_seconds = body.ttl_seconds or resources.settings.adapter_ttl_seconds
    with service.quotas.reserve_bytes(principal.tenant, record.adapter_id, record.size_bytes):
        return record, service, await service.provider.keep(record, ttl_seconds)


def _read_file(field: str, content: str | bytes) -> bytes:
    if isinstance(content, bytes):
        return content
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidInputError(f"`{field}` is not base64: send the file's bytes") from None
