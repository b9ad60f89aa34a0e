"""Settings: read from the environment only, all documented, wrong ones refused."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from service.errors import InvalidInputError
from service.settings import ENV_PREFIX, Settings, read_settings, render_settings_table

README = Path(__file__).parents[3] / "README.md"


@pytest.fixture(autouse=True)
def _clear_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"{ENV_PREFIX}{name.upper()}", raising=False)


def test_readme_documents_every_setting() -> None:
    text = README.read_text()
    assert text.count("<!-- settings -->") == text.count("<!-- /settings -->") == 1
    documented = text.split("<!-- settings -->")[1].split("<!-- /settings -->")[0]
    assert documented.strip() == render_settings_table(), (
        "README.md's settings table is stale: paste service.settings.render_settings_table()"
    )


def test_table_has_a_row_with_unit_and_meaning_for_every_setting() -> None:
    rows = render_settings_table().splitlines()[2:]
    assert len(rows) == len(Settings.model_fields)
    for name, row in zip(Settings.model_fields, rows, strict=True):
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert cells[0] == f"`{ENV_PREFIX}{name.upper()}`"
        assert len(cells) == 4, row
        assert all(cells), row


def test_defaults_serve_the_embedded_bundle_without_redis() -> None:
    settings = read_settings()
    assert settings.bundle.parts[-3:] == ("service", "bundles", "text-smollm2")
    assert settings.base is None
    assert settings.redis_url.get_secret_value() == ""


def test_environment_overrides_and_empty_values_count_as_unset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ICM_LORA_PORT", "9001")
    monkeypatch.setenv("ICM_LORA_REDIS_URL", "redis://:hunter2@localhost:6379/0")
    monkeypatch.setenv("ICM_LORA_BASE", "")
    settings = read_settings()
    assert (settings.port, settings.base) == (9001, None)
    assert "hunter2" not in repr(settings)


def test_wrong_value_names_the_variable_but_not_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICM_LORA_MAX_QUEUE", "many-secrets")
    with pytest.raises(InvalidInputError, match="ICM_LORA_MAX_QUEUE") as caught:
        read_settings()
    assert "many-secrets" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("ICM_LORA_REDIS_ULR", "redis://localhost", "did you mean ICM_LORA_REDIS_URL"),
        ("ICM_LORA_PORT_8000_TCP", "tcp://10.0.0.1:8000", "enableServiceLinks"),
    ],
)
def test_unknown_variable_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, hint: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidInputError, match=hint):
        read_settings()


def test_settings_are_frozen_and_refuse_unknown_names() -> None:
    with pytest.raises(ValidationError):
        Settings.model_validate({"prot": 1})
    with pytest.raises(ValidationError):
        Settings().port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("value", "served"), [("none", None), ("", None), ("NONE", None), ("/x", "/x")]
)
def test_detection_can_be_turned_off(
    monkeypatch: pytest.MonkeyPatch, value: str, served: str | None
) -> None:
    monkeypatch.setenv("ICM_LORA_DETECTION_BUNDLE", value)
    settings = read_settings()
    assert settings.detection_bundle == (None if served is None else Path(served))
    assert settings.bundle is not None


def test_shipped_detection_bundle_is_served_where_it_is_there() -> None:
    shipped = Settings.model_fields["detection_bundle"].default
    assert read_settings().detection_bundle == (shipped if shipped.is_dir() else None)


def test_nothing_to_serve_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICM_LORA_BUNDLE", "none")
    monkeypatch.setenv("ICM_LORA_DETECTION_BUNDLE", "folder")
    assert read_settings().bundle is None
    monkeypatch.setenv("ICM_LORA_DETECTION_BUNDLE", "none")
    with pytest.raises(InvalidInputError, match="nothing to serve: name a bundle"):
        read_settings()
