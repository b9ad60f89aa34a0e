"""API keys: the file that names them by their hashes, and how a new one is made."""

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from service.errors import InvalidInputError

KEY_PREFIX = "icm_"
"""Makes a leaked key recognisable to scanners of secrets."""

TENANT_PATTERN = r"^[A-Za-z0-9._-]{1,64}$"
_KEY_BYTES = 32
_MAX_FILE_BYTES = 16 * 2**20
_SHA256_PATTERN = r"^[0-9a-f]{64}$"


class TenantLimits(BaseModel):
    """Limits of one tenant; None takes the setting of the same name, 0 is no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    requests_per_second: Annotated[float | None, Field(ge=0)] = None
    request_burst: Annotated[int | None, Field(ge=1)] = None
    concurrent_requests: Annotated[int | None, Field(ge=0)] = None
    tokens_per_minute: Annotated[int | None, Field(ge=0)] = None
    adapter_bytes: Annotated[int | None, Field(ge=0)] = None
    pinned_bytes: Annotated[int | None, Field(ge=0)] = None


class KeyEntry(BaseModel):
    """One key of the file.

    Attributes:
        tenant: who owns what is made with the key.
        sha256: of the key, hexadecimal. A slow hash as bcrypt protects passwords, which can be
            guessed; a key is 256 random bits, which cannot, and every request is checked.
        scopes: what the key allows.
        limits: of the tenant, on one or more of its keys.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tenant: Annotated[str, Field(pattern=TENANT_PATTERN)]
    sha256: Annotated[str, Field(pattern=_SHA256_PATTERN)]
    scopes: Annotated[frozenset[Literal["infer", "generate", "admin"]], Field(min_length=1)]
    limits: TenantLimits | None = None


@dataclass(frozen=True)
class KeyRing:
    """All keys of a service.

    Attributes:
        entries: one a key.
        limits: of the tenants that have their own.
    """

    entries: tuple[KeyEntry, ...]
    limits: Mapping[str, TenantLimits]

    def find(self, key: str) -> KeyEntry | None:
        """The entry of a key, in a time that tells nothing about the keys there are."""
        digest = hash_key(key)
        found = None
        for entry in self.entries:  # all of them, whichever matches
            if hmac.compare_digest(digest, entry.sha256):
                found = entry
        return found


def read_keys(path: Path) -> KeyRing:
    """Reads a JSON list of `{"tenant", "sha256", "scopes", "limits"?}`.

    Raises:
        InvalidInputError: the file is missing or wrong; a service that was to be closed must
            not start open.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES)
        entries = TypeAdapter(tuple[KeyEntry, ...]).validate_json(content)
    except OSError as error:
        raise InvalidInputError(f"keys file {path}: {error.strerror}") from None
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        problems = [f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}" for item in found]
        raise InvalidInputError(f"keys file {path}: {'; '.join(problems)}") from None
    if not entries:
        raise InvalidInputError(f"keys file {path}: no keys; nobody could use the service")
    if len({entry.sha256 for entry in entries}) < len(entries):
        raise InvalidInputError(f"keys file {path}: two entries have the same `sha256`")
    limits: dict[str, TenantLimits] = {}
    for entry in entries:
        if entry.limits and limits.setdefault(entry.tenant, entry.limits) != entry.limits:
            raise InvalidInputError(
                f"keys file {path}: two keys of tenant {entry.tenant} give it different limits"
            )
    return KeyRing(entries, limits)


def make_key(tenant: str, scopes: list[str]) -> tuple[str, str]:
    """A new random key, and its entry for the keys file as one line of JSON.

    Raises:
        InvalidInputError: no such scope, or the tenant's name has other characters.
    """
    if not re.fullmatch(TENANT_PATTERN, tenant):
        raise InvalidInputError("a tenant's name is 1 to 64 of: letters, digits, `.`, `_`, `-`")
    key = KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    entry = {"tenant": tenant, "sha256": hash_key(key), "scopes": sorted(set(scopes))}
    try:
        KeyEntry.model_validate(entry)
    except ValidationError:
        raise InvalidInputError("a scope is one of: infer, generate, admin") from None
    return key, json.dumps(entry)


def hash_key(key: str) -> str:
    """sha256 of a key, hexadecimal."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
