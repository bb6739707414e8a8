"""Find an ISPC compiler, or install one, without touching the system's C library.

Order: `$ISPC`; `ispc` on PATH; the private install of an earlier run; the system's package, if its
archive carries one and we are root; a private install into the cache folder. The private install is
Debian's package with its own libc and loader, run through that loader by a two-line script, so it
works on releases older than the package and without root.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from cpu_kernels.apt_private import (
    Archive,
    PrivateApt,
    configured_archives,
    find_keyring,
    run,
    unpack,
)
from cpu_kernels.errors import KernelBuildError

MIN_VERSION = (1, 20)
# The first Debian release whose archive carries ISPC.
DEBIAN_SUITE = "trixie"
PRIVATE_BYTES = 500 << 20
ADVICE = "install ISPC ≥ 1.20 and set ISPC=/path/to/ispc"
SUPPORTED_MACHINES = ("x86_64", "aarch64")


def ispc_version(ispc: Path) -> tuple[int, int]:
    """Return the compiler's (major, minor) version.

    Raises:
        KernelBuildError: The file cannot be run or is not ISPC.
    """
    try:
        done = subprocess.run([ispc, "--version"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise KernelBuildError(f"cannot run {ispc}: {error.strerror}; {ADVICE}") from error
    match = re.search(r"ISPC\),? +(\d+)\.(\d+)", done.stdout)
    if match is None:
        raise KernelBuildError(f"{ispc} does not answer as an ISPC compiler; {ADVICE}")
    return int(match[1]), int(match[2])


def private_ispc(cache_dir: Path) -> Path:
    """Return where the private install's compiler is, or would be."""
    return cache_dir / "toolchains" / f"ispc-{DEBIAN_SUITE}" / "ispc"


def find_ispc(cache_dir: Path) -> Path | None:
    """Return an ISPC that is already here, without running it, or None.

    Raises:
        KernelBuildError: `$ISPC` is set but names no executable file.
    """
    if explicit := os.environ.get("ISPC"):
        if (found := shutil.which(explicit)) is None:
            raise KernelBuildError(f"ISPC={explicit} is not an executable file; {ADVICE}")
        return Path(found)
    if found := shutil.which("ispc"):
        return Path(found)
    private = private_ispc(cache_dir)
    return private if os.access(private, os.X_OK) else None


def ensure_ispc(cache_dir: Path, on_progress: Callable[[str], None]) -> Path:
    """Return a usable ISPC, installing one if there is none.

    Args:
        cache_dir: The private install goes to `<cache_dir>/toolchains`.
        on_progress: Called with a short text before each slow part.

    Raises:
        KernelBuildError: None can be had; the message says what is missing and how to get it.
    """
    found = find_ispc(cache_dir)
    if found is not None:
        version = ispc_version(found)
        if version >= MIN_VERSION:
            return found
        if os.environ.get("ISPC"):
            raise KernelBuildError(f"{found} is ISPC {version[0]}.{version[1]}; {ADVICE}")
        on_progress(f"{found} is too old (ISPC {version[0]}.{version[1]})")
        if os.access(private := private_ispc(cache_dir), os.X_OK):
            return private
    if platform.system() != "Linux" or platform.machine() not in SUPPORTED_MACHINES:
        machine = f"{platform.system()} on {platform.machine()}"
        raise KernelBuildError(f"ISPC cannot be installed for {machine}; {ADVICE}")
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise KernelBuildError(f"no ISPC compiler, and no apt to install one with; {ADVICE}")
    if os.geteuid() == 0 and _archive_version() >= MIN_VERSION:
        return _install_system(on_progress)
    return _install_private(cache_dir, on_progress)


def _archive_version() -> tuple[int, int]:
    """Return the version of the system archive's package, (0, 0) if it carries none."""
    text = run(
        ["apt-cache", "policy", "ispc"], "cannot ask apt for ispc", os.environ | {"LC_ALL": "C"}
    )
    match = re.search(r"Candidate: (?:\d+:)?(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _install_system(on_progress: Callable[[str], None]) -> Path:
    """Install the distribution's own package; only root gets here."""
    on_progress("installing the system's ispc package")
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "install", "-y", "--no-install-recommends", "ispc"]
    run(command, "cannot install the system's ispc package", env)
    if (found := shutil.which("ispc")) is None:
        raise KernelBuildError(
            f"the ispc package was installed but `ispc` is not on PATH; {ADVICE}"
        )
    return Path(found)


def _install_private(cache_dir: Path, on_progress: Callable[[str], None]) -> Path:
    """Unpack ISPC with its own libc under the cache folder; complete or not there at all."""
    wrapper = private_ispc(cache_dir)
    toolchains = wrapper.parent.parent
    try:
        toolchains.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(toolchains).free) < PRIVATE_BYTES:
            raise KernelBuildError(
                f"installing ISPC needs {PRIVATE_BYTES >> 20} MiB in {toolchains}, "
                f"{free >> 20} MiB are free; make room, or {ADVICE}"
            )
        with tempfile.TemporaryDirectory(dir=toolchains, prefix=".ispc-") as temp:
            _fill(Path(temp), wrapper.parent, on_progress)
            if wrapper.parent.exists():
                shutil.rmtree(wrapper.parent)
            (Path(temp) / "tree").rename(wrapper.parent)
    except OSError as error:
        raise KernelBuildError(
            f"cannot install ISPC in {toolchains}: {error.strerror}; set NEO_CACHE_DIR, or {ADVICE}"
        ) from error
    ispc_version(wrapper)
    return wrapper


def _fill(temp: Path, final: Path, on_progress: Callable[[str], None]) -> None:
    """Make `temp/tree`, which runs once it is renamed to `final`."""
    archive, components, keyring = _choose_archive(temp)
    (temp / "apt").mkdir()
    try:
        debs = PrivateApt(temp / "apt", archive, components, keyring).download("ispc", on_progress)
    except KernelBuildError as error:
        raise KernelBuildError(f"{error}; or {ADVICE}") from error
    on_progress(f"unpacking {len(debs)} packages")
    tree = temp / "tree"
    unpack(debs, tree)
    loaders = sorted(tree.glob("usr/lib*/**/ld-linux-*.so.*")) or sorted(
        tree.glob("lib*/**/ld-*.so.*")
    )
    if not loaders or not (tree / "usr/bin/ispc").exists():
        raise KernelBuildError(
            f"the ispc package of {archive.suite} has an unknown layout; {ADVICE}"
        )
    loader = final / loaders[0].relative_to(tree)
    libraries = ":".join(
        str(final / folder.relative_to(tree))
        for pattern in ("usr/lib/*-linux-gnu", "lib/*-linux-gnu", "usr/lib/llvm-*/lib")
        for folder in sorted(tree.glob(pattern))
    )
    script = tree / "ispc"
    script.write_text(
        f"#!/bin/sh\nexec '{loader}' --library-path '{libraries}' '{final}/usr/bin/ispc' \"$@\"\n"
    )
    script.chmod(0o755)


def _choose_archive(temp: Path) -> tuple[Archive, str, Path | None]:
    """Choose archive, components and keyring: the machine's own release, else a later Debian's."""
    archives = configured_archives(temp)
    if not archives:
        raise KernelBuildError(f"apt has no package sources configured; {ADVICE}")
    if _archive_version() >= MIN_VERSION:
        return archives[0], "main universe" if _os_id() == "ubuntu" else "main", None
    if _os_id() != "debian":
        raise KernelBuildError(f"this system's archive carries no recent ISPC; {ADVICE}")
    main = next((a for a in archives if re.fullmatch(r"[a-z]+", a.suite)), archives[0])
    keyring = find_keyring(DEBIAN_SUITE)
    if keyring is None:
        raise KernelBuildError(
            f"this machine has no keys for Debian {DEBIAN_SUITE}: "
            f"install a newer debian-archive-keyring, or {ADVICE}"
        )
    return Archive(uri=main.uri, suite=DEBIAN_SUITE), "main", keyring


def _os_id() -> str:
    """Return the distribution's id, such as `debian`."""
    try:
        return platform.freedesktop_os_release()["ID"]
    except OSError:
        return "unknown"


def main() -> None:
    """Print the path of an ISPC compiler, installing one if needed."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("cache_dir", type=Path)
    try:
        print(ensure_ispc(parser.parse_args().cache_dir.absolute(), print))
    except KernelBuildError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
