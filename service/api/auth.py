"""Who asks, and what they may do: tenants, scopes, and the routes that need them.

Everything is closed unless it is opened by name: with keys configured, a request without a valid
one gets 401 before its path is looked at or its body is read (`OPEN_PATHS` are the exceptions),
and a route cannot be made without saying which scope it needs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.routing import APIRoute, iter_route_contexts
from starlette.datastructures import Headers
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Connection

from service.api.error_handlers import (
    BodyTooLargeError,
    HeadTooLargeError,
    InvalidRequestError,
    MalformedRequestError,
    RequestTimeoutError,
    problem_response,
)
from service.api.keys import KeyRing
from service.api.openai.errors import document_errors, speaks_openai
from service.api.openapi import document_problems, merge_responses
from service.errors import (
    ForbiddenError,
    IcmLoraError,
    RateLimitedError,
    UnauthenticatedError,
)

PUBLIC_TENANT = "public"
"""Owner of everything where no keys are configured."""

OPEN_PATHS = frozenset({"/health/live", "/health/ready"})
"""What answers without a key: an orchestrator's probes carry none."""

REFUSALS = (UnauthenticatedError, ForbiddenError, RateLimitedError, HeadTooLargeError)
"""What every route but the open ones may answer."""

BODY_REFUSALS = (
    MalformedRequestError,
    RequestTimeoutError,
    BodyTooLargeError,
    InvalidRequestError,
)
"""What every route that takes a body may answer, too."""

API_KEY_HEADER = "X-API-Key"
_BEARER = "bearer"
_OPENAPI_SCHEMES = {
    "bearer": {"type": "http", "scheme": _BEARER},
    "api_key": {"type": "apiKey", "in": "header", "name": API_KEY_HEADER},
}
_PRINCIPAL = "principal"
_NEEDED_SCOPE = "__needed_scope__"

EndpointT = TypeVar("EndpointT", bound=Callable[..., Any])


class Scope(StrEnum):
    """What a key allows; `admin` allows everything."""

    INFER = "infer"
    GENERATE = "generate"
    ADMIN = "admin"


@dataclass(frozen=True)
class Principal:
    """Who sent a request.

    Attributes:
        tenant: owner of what the request makes; another tenant's adapters do not exist for it.
        scopes: what the key allows.
    """

    tenant: str
    scopes: frozenset[Scope]

    def may(self, scope: Scope) -> bool:
        """Whether the key allows it."""
        return scope in self.scopes or Scope.ADMIN in self.scopes


PUBLIC = Principal(PUBLIC_TENANT, frozenset(Scope))
"""Everybody, where no keys are configured."""


async def get_principal(request: Request) -> Principal:
    """Who sent the request, as `Authentication` found out."""
    principal = find_principal(request.scope)
    assert principal is not None, "Authentication did not run"
    return principal


def find_principal(connection: Connection) -> Principal | None:
    """Who sent the request of an ASGI connection; None on `OPEN_PATHS`."""
    principal: Principal | None = connection.get("state", {}).get(_PRINCIPAL)
    return principal


PrincipalDep = Annotated[Principal, Depends(get_principal)]


def needs(scope: Scope | None) -> Callable[[EndpointT], EndpointT]:
    """Declares the scope that an endpoint needs (None: none, also no key, see `OPEN_PATHS`)."""

    def declare(endpoint: EndpointT) -> EndpointT:
        setattr(endpoint, _NEEDED_SCOPE, scope)
        return endpoint

    return declare


class GuardedRoute(APIRoute):
    """A route that checks the declared scope before it reads anything of the request.

    FastAPI's dependencies run only after the body was read and parsed. Use it as
    `APIRouter(route_class=GuardedRoute)`, with `@needs(...)` below each `@router.get(...)`.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        assert hasattr(endpoint, _NEEDED_SCOPE), f"{path}: say which scope it needs with @needs"
        self.needed_scope: Scope | None = getattr(endpoint, _NEEDED_SCOPE)
        super().__init__(path, endpoint, **options)

    async def handle(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Serves a request whose path matched.

        Raises:
            ForbiddenError: the key lacks the scope.
        """
        if self.needed_scope is not None and scope["method"] in (self.methods or ()):
            principal = find_principal(scope)
            assert principal is not None, "Authentication did not run"
            if not principal.may(self.needed_scope):
                raise ForbiddenError(f"this needs a key with the scope `{self.needed_scope}`")
        await super().handle(scope, receive, send)


class Authentication:
    """Pure ASGI middleware: finds out who asks, and refuses those who are nobody with 401.

    Args:
        app: what answers.
        keys: of all tenants; None lets everybody in as the tenant `public`.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing | None) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Serves one ASGI connection."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            principal = PUBLIC if self.keys is None else _identify(self.keys, Headers(scope=scope))
            if principal is None:
                error = UnauthenticatedError(
                    f"send a valid key as `Authorization: Bearer KEY` or `{API_KEY_HEADER}: KEY`"
                )
                await problem_response(error, scope["path"])(scope, receive, send)
                return
            scope.setdefault("state", {})[_PRINCIPAL] = principal
        await self.app(scope, receive, send)


def _identify(keys: KeyRing, headers: Headers) -> Principal | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    key = token.strip() if scheme.lower() == _BEARER else headers.get(API_KEY_HEADER, "")
    entry = keys.find(key)
    if entry is None:
        return None
    return Principal(entry.tenant, frozenset(map(Scope, entry.scopes)))


def check_routes(routes: list[BaseRoute]) -> None:
    """Our bug where a route declares no scope, or an open one is not among `OPEN_PATHS`."""
    for context in iter_route_contexts(routes):
        route = context.route
        if isinstance(route, APIRoute):
            assert isinstance(route, GuardedRoute), f"{route.path}: use GuardedRoute"
            is_open = route.path in OPEN_PATHS
            assert (route.needed_scope is None) == is_open, f"{route.path}: needs a scope"


def describe_security(routes: list[BaseRoute], document: dict[str, Any], needed: bool) -> None:
    """Writes the scopes of all routes, and what all of them may answer, into an OpenAPI document.

    Args:
        routes: of the application.
        document: OpenAPI's.
        needed: whether keys are configured; otherwise a request without one is fine, too.
    """
    document.setdefault("components", {})["securitySchemes"] = _OPENAPI_SCHEMES
    for context in iter_route_contexts(routes):
        route = context.route
        if not isinstance(route, GuardedRoute) or route.path_format not in document["paths"]:
            continue
        for method in route.methods or ():
            if operation := document["paths"][route.path_format].get(method.lower()):
                if (scope := route.needed_scope) is None:
                    operation["security"] = []
                    continue
                named: list[dict[str, list[str]]]
                named = [{name: [scope.value]} for name in _OPENAPI_SCHEMES]
                operation["security"] = named if needed else [*named, {}]
                errors: list[type[IcmLoraError]] = [*REFUSALS]
                if "requestBody" in operation:
                    errors += BODY_REFUSALS
                is_openai = speaks_openai(route.path_format)
                refusals = document_errors(errors) if is_openai else document_problems(*errors)
                merge_responses(operation["responses"], refusals)
