"""Download Debian packages and their whole dependency closure into a folder, beside the system.

Everything apt writes (lists, status, archives) lives in the folder given: the machine's own package
state is neither read nor changed, and no root is needed. This file knows nothing of ISPC.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cpu_kernels.errors import KernelBuildError

KEYRING_DIRS = (Path("/usr/share/keyrings"), Path("/etc/apt/trusted.gpg.d"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """One configured package archive: its base address and the suite the machine takes from it."""

    uri: str
    suite: str


def run(command: list[str], what: str, env: dict[str, str] | None = None) -> str:
    """Run a command and return its standard output.

    Raises:
        KernelBuildError: The command is missing or failed; the message has its last line of errors.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    except OSError as error:
        raise KernelBuildError(f"{what}: cannot run {command[0]}: {error.strerror}") from error
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith("E:")), lines[-1] if lines else "")
        raise KernelBuildError(f"{what}: {reason or f'exit status {done.returncode}'}")
    return done.stdout


def configured_archives(scratch: Path) -> list[Archive]:
    """List the archives that this machine's apt is configured to use, in order.

    `apt-get update --print-uris` resolves every format of source list and every variable in it.
    """
    options = ["-o", "Debug::NoLocking=1", "-o", f"Dir::State::lists={scratch / 'probe'}"]
    (scratch / "probe" / "partial").mkdir(parents=True, exist_ok=True)
    text = run(["apt-get", "update", "--print-uris", *options], "cannot list apt's sources")
    found = re.findall(r"'(\S+?)/dists/(\S+)/(?:In)?Release'", text)
    return [Archive(uri=uri, suite=suite) for uri, suite in found]


def write_sources(path: Path, archive: Archive, components: str, keyring: Path | None) -> None:
    """Write a one-line source list; `keyring` None leaves the choice of keys to apt."""
    signed_by = f"[signed-by={keyring}] " if keyring else ""
    path.write_text(f"deb {signed_by}{archive.uri} {archive.suite} {components}\n")


def find_keyring(suite: str) -> Path | None:
    """Return the machine's own keyring for a Debian suite, or None if it carries none by name."""
    names = (f"debian-archive-{suite}-stable", f"debian-archive-{suite}-automatic")
    for folder in KEYRING_DIRS:
        for name in names:
            for suffix in (".pgp", ".gpg", ".asc"):
                if (keyring := folder / f"{name}{suffix}").is_file():
                    return keyring
    return None


class PrivateApt:
    """apt with its own state in `folder`: no installed packages, one source list.

    Args:
        folder: Existing, empty, writable folder.
        archive: Where to take packages from.
        components: Space-separated components, such as `main universe`.
        keyring: Keys that must have signed the archive; None uses the machine's trusted keys.
    """

    def __init__(
        self, folder: Path, archive: Archive, components: str, keyring: Path | None
    ) -> None:
        self.folder = folder
        for name in ("lists/partial", "cache/archives/partial", "parts", "state"):
            (folder / name).mkdir(parents=True)
        (folder / "status").touch()
        write_sources(folder / "sources.list", archive, components, keyring)
        settings = {
            "Dir::State": folder / "state",
            "Dir::State::lists": folder / "lists",
            "Dir::State::status": folder / "status",
            "Dir::State::extended_states": folder / "extended_states",
            "Dir::Cache": folder / "cache",
            "Dir::Etc::SourceList": folder / "sources.list",
            "Dir::Etc::SourceParts": folder / "parts",
            "Dir::Etc::Preferences": folder / "no-preferences",
            "Dir::Etc::PreferencesParts": folder / "parts",
            "Dir::Log": folder / "state",
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "root" if os.geteuid() == 0 else "",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
            "Debug::NoLocking": "true",
        }
        self.options = [
            part for key, value in settings.items() for part in ("-o", f"{key}={value}")
        ]

    def download(self, package: str, on_progress: Callable[[str], None]) -> list[Path]:
        """Fetch `package` and everything it depends on; return the archives' paths.

        Raises:
            KernelBuildError: No network, bad signature, no such package or no space.
        """
        on_progress("reading the package lists")
        update = [*self.options, "-o", "APT::Update::Error-Mode=any", "update"]
        run(["apt-get", *update], "cannot read the package lists (is there a network?)")
        on_progress(f"downloading {package} and the libraries it needs")
        install = [*self.options, "install", "--download-only", "-y", package]
        run(["apt-get", *install], f"cannot download the package {package}")
        return sorted((self.folder / "cache" / "archives").glob("*.deb"))


def unpack(archives: list[Path], dest: Path) -> None:
    """Unpack package archives over each other into `dest`; no maintainer script runs."""
    if shutil.which("dpkg-deb") is None:
        raise KernelBuildError("cannot unpack packages: dpkg-deb is missing")
    dest.mkdir(parents=True, exist_ok=True)
    for archive in archives:
        run(["dpkg-deb", "-x", str(archive), str(dest)], f"cannot unpack {archive.name}")
