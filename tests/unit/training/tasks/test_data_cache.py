"""The cache folder, and files that are there whole or not at all."""

from pathlib import Path

import pytest

from training.tasks.cache import default_cache_dir, open_scratch_dir, write_atomically


def test_the_variable_wins_over_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICM_LORA_CACHE_DIR", "/data/icm")
    assert default_cache_dir() == Path("/data/icm")
    for value in (None, ""):
        monkeypatch.setenv("HOME", "/home/ada")
        monkeypatch.delenv("ICM_LORA_CACHE_DIR", raising=False)
        if value is not None:
            monkeypatch.setenv("ICM_LORA_CACHE_DIR", value)
        assert default_cache_dir() == Path("/home/ada/.cache/icm-lora")


def test_a_written_file_is_alone_in_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.jsonl"
    write_atomically(path, "first\n")
    write_atomically(path, "caf\u00e9\r\n")
    assert path.read_bytes() == "caf\u00e9\r\n".encode()
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_scratch_folder_is_removed_even_after_an_error(tmp_path: Path) -> None:
    def fail() -> None:
        with open_scratch_dir(tmp_path) as scratch:
            (scratch / "file").write_text("x")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not list(tmp_path.iterdir())
