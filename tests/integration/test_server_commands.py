"""`icm-lora` against the real service with the tiny bundle."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.http_service import make_settings, serve_in_thread
from tests.fixtures.tiny_bundle import TinyBundle
from training.cli import main

RECIPE = "Write a cooking recipe."


@pytest.fixture(scope="module")
def url(tiny_bundle: TinyBundle) -> Iterator[str]:
    with serve_in_thread(make_settings(tiny_bundle)) as running:
        yield str(running.base_url)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that must succeed prints."""
    assert main(list(arguments)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_adapter_from_words_to_a_folder(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "peft"
    said = run(capsys, "generate", RECIPE, "--server", url, "--out", str(out))
    adapter_id = said.split()[1]
    assert len(adapter_id) == 64
    assert {path.name for path in out.iterdir()} >= {"adapter_config.json"}
    listed = run(capsys, "served", "list", "--server", url)
    assert f"{adapter_id}\ttext\t{RECIPE}" in listed.splitlines()
    known = json.loads(run(capsys, "served", "get", adapter_id, "--server", url))
    assert known["nearest"][0]["name"] == "recipes"
    assert main(["served", "download", adapter_id, "--server", url, "--out", str(out)]) == 1
    assert "is not empty" in capsys.readouterr().err
    run(capsys, "served", "delete", adapter_id, "--server", url)
    assert main(["served", "get", adapter_id, "--server", url]) == 1
    assert capsys.readouterr().err.startswith("error [adapter_not_found]: ")


def test_adapter_from_files_of_examples(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for path in files:
        path.write_text(f"Preheat the oven for {path.stem}.")
    command = ["generate", "--server", url, "--json", "--example", *map(str, files)]
    alone = json.loads(run(capsys, *command))
    both = json.loads(run(capsys, "generate", RECIPE, *command[1:]))
    assert (alone["recipe"]["task"], both["recipe"]["task"]) == ("", RECIPE)
    assert alone["recipe"]["examples"] == both["recipe"]["examples"] != ""
    assert alone["vector_sha256"] != both["vector_sha256"]
    assert not alone["regenerable"]
    said = run(capsys, *command[:3], *command[4:], "--refine-steps", "2")
    assert "refined in 2 steps: examples " in said
    assert main(["generate", RECIPE, "--refine-steps", "2", "--out", str(tmp_path / "x")]) == 1
    assert "read by a service" in capsys.readouterr().err


def test_prompt_is_answered_and_the_answerer_named(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["infer", "Preheat", "--max-tokens", "4", "--server", url, "--json"]
    assert main([*command, "--task", RECIPE]) == 0
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert answer["usage"]["completion_tokens"] <= 4
    assert printed.err == f"answered by {answer['receipt']['adapter_id']}\n"
    base = json.loads(run(capsys, *command, "--adapter", "base"))
    assert base["receipt"]["adapter_id"] == "base"


def test_alias_is_put_used_and_deleted(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    put = ["aliases", "put", "cook", "--task", RECIPE, "--server", url]
    first = json.loads(run(capsys, *put, "--pinned", "--expected-generation", "0"))
    assert (first["name"], first["generation"], first["pinned"]) == ("cook", 1, True)
    assert main([*put, "--expected-generation", "7"]) == 1
    assert "error [generation_conflict]" in capsys.readouterr().err
    assert "cook\t1\t" in run(capsys, "aliases", "list", "--server", url)
    read = json.loads(run(capsys, "aliases", "get", "cook", "--server", url))
    assert read["adapter_id"] == first["adapter_id"]
    assert main(["infer", "Preheat", "--max-tokens", "2", "--alias", "cook", "--server", url]) == 0
    assert capsys.readouterr().err == f"answered by {first['adapter_id']}\n"
    run(capsys, "aliases", "delete", "cook", "--server", url)
    assert run(capsys, "aliases", "list", "--server", url) == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", RECIPE], "name a folder with --out, or a service with --server"),
        (["generate", RECIPE, "--server", "http://x", "--bundle", "y"], "leave out --bundle"),
        (["generate", "--server", "http://x"], "or name files with --example"),
        (["generate", "--server", "http://x", "--example", "nowhere.txt"], "cannot be read"),
        (["generate", "--out", "x", "--example", "a.txt"], "name one with --server"),
        (["generate", "--out", "x"], "describe the task in words"),
        (["infer", "--task", RECIPE], "give a PROMPT"),
        (["infer", "--task", RECIPE, "--image", "x.png", "--seed", "1"], "leave out seed"),
        (["served", "list", "--server", "http://127.0.0.1:9"], "error [unreachable]"),
    ],
)
def test_wrong_use_is_one_line_that_says_what_to_change(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
