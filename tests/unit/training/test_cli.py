from pathlib import Path

import pytest

from training.cli import build_parser, main
from training.tasks import text_families
from training.tasks.documents import Document, hold_out_units
from training.tasks.prepared_texts import Corpus


def test_dry_run_prints_counts_without_a_run_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "smoke", "--dry-run"]) == 0
    assert "adapter parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "smoke"], "--out RUN is needed"),
        (["train", "nonsense", "--dry-run"], "shipped recipes: "),
        (["bundle", "make", "nowhere"], "no run in nowhere"),
        (["bundle", "inspect", "nowhere"], "bundle.json is missing"),
        (["prepare", "--base", "embedded:gpt-9"], "not embedded"),
    ],
)
def test_errors_are_one_line_that_says_what_to_change(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert message.startswith("error [")
    assert words in message
    assert message.count("\n") == 1


def test_an_unknown_recipe_key_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shipped = Path("training/recipes/smoke.toml").read_text()
    recipe = tmp_path / "typo.toml"
    recipe.write_text(shipped.replace("learning_rate", "learning_rte", 1))
    assert main(["train", str(recipe), "--dry-run"]) == 1
    assert "finetune.learning_rte" in capsys.readouterr().err


def test_wrong_usage_is_status_two(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        build_parser().parse_args(["evaluate", "--suite", "nonsense"])
    assert exit_.value.code == 2
    assert "text" in capsys.readouterr().err


def test_data_families_prepares_the_families_and_no_domain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"one": 9_000, "two": 3_000}
    documents = [
        Document(unit, " ".join(f"{unit}{number}" for number in range(size)))
        for unit, size in sizes.items()
    ]
    corpus = Corpus((), lambda _root: iter(documents), hold_out_units("two"))
    monkeypatch.setattr(text_families, "FAMILY_TEXTS", {"mail_spam": corpus})
    monkeypatch.setenv("ICM_LORA_CACHE_DIR", str(tmp_path))
    assert main(["data", "families"]) == 0
    assert [path.name for path in (tmp_path / "text").glob("[!.]*")] == ["mail_spam.jsonl"]
