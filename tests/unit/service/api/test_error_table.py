"""One table of stable codes: complete, unique, and what every route documents."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.dependencies.models import Dependant
from fastapi.routing import iter_route_contexts

import service
from service import errors
from service.api.app import create_app
from service.api.auth import OPEN_PATHS, REFUSALS, GuardedRoute
from service.api.dependencies import get_resources, parse_adapter_id
from service.api.error_table import list_errors, render_errors_table
from service.errors import AdapterNotFoundError, IcmLoraError, NotReadyError
from service.settings import Settings

README = Path(__file__).parents[4] / "README.md"
OF_BODIES = {"malformed_request", "request_timeout", "body_too_large", "invalid_request"}


def import_all() -> None:
    for module in pkgutil.walk_packages(service.__path__, "service."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def list_classes(root: type[IcmLoraError]) -> Iterator[type[IcmLoraError]]:
    yield root
    for child in root.__subclasses__():
        yield from list_classes(child)


def test_table_has_every_code_once_with_its_status() -> None:
    import_all()
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \|", README.read_text(), re.MULTILINE)
    assert len({code for code, _ in rows}) == len(rows)
    found = {error.code: error.status for error in list_classes(IcmLoraError)
             if error.__module__.startswith("service.")}  # fmt: skip
    assert {code: int(status) for code, status in rows} == found
    assert all(f"`{code}`" in render_errors_table() for code in found)


def test_a_code_has_one_status_and_one_class_that_names_it() -> None:
    import_all()
    named = [error.code for error in list_errors()]
    assert len(named) == len(set(named))
    for error in list_errors():
        assert re.fullmatch("[a-z][a-z_]+", error.code)
        assert 400 <= error.status < 600
        assert error.__doc__


def test_drawing_of_the_tree_is_true() -> None:
    drawn = re.findall(r"(\w+Error) \((\d+) (\w+)\)", errors.__doc__ or "")
    classes = [member for _, member in inspect.getmembers(errors, inspect.isclass)]
    assert {(each.__name__, str(each.status), each.code) for each in classes
            if issubclass(each, IcmLoraError)} == set(drawn)  # fmt: skip


def list_calls(dependant: Dependant) -> set[Any]:
    """Every function that FastAPI calls for a route."""
    return {dependant.call}.union(*(list_calls(each) for each in dependant.dependencies))


def list_operations() -> Iterator[tuple[GuardedRoute, str, dict[str, Any]]]:
    app = create_app(Settings())
    paths = app.openapi()["paths"]
    for context in iter_route_contexts(app.routes):
        route = context.route
        if isinstance(route, GuardedRoute):
            for method in route.methods or ():
                yield route, f"{method} {route.path}", paths[route.path_format][method.lower()]


@pytest.mark.parametrize(
    ("route", "operation"),
    [pytest.param(route, operation, id=name) for route, name, operation in list_operations()],
)
def test_routes_document_what_they_can_answer(
    route: GuardedRoute, operation: dict[str, Any]
) -> None:
    documented = {
        code
        for response in operation["responses"].values()
        for content in response.get("content", {}).values()
        for code in content.get("examples", {})
    }
    expected = {IcmLoraError.code}
    if route.path not in OPEN_PATHS:
        expected |= {error.code for error in REFUSALS}
    if "requestBody" in operation:
        expected |= OF_BODIES
    calls = list_calls(route.dependant)
    if get_resources in calls:
        expected.add(NotReadyError.code)
    if parse_adapter_id in calls:
        expected.add(AdapterNotFoundError.code)
    assert expected <= documented
    known = {error.code for error in list_errors()}
    assert documented <= known
