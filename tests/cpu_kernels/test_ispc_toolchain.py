"""Finding ISPC, and every reason why it cannot be installed. Nothing is downloaded here."""

from pathlib import Path

import pytest

from cpu_kernels import ispc_toolchain
from cpu_kernels.apt_private import Archive
from cpu_kernels.errors import KernelBuildError
from cpu_kernels.ispc_toolchain import ensure_ispc, find_ispc, private_ispc

ADVICE = r"install ISPC ≥ 1\.20 and set ISPC=/path/to/ispc$"


def fake_ispc(path: Path, version: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho 'Intel(r) Implicit (Intel(r) ISPC), {version} (build)'\n")
    path.chmod(0o755)
    return path


def ignore(message: str) -> None:
    """Drop progress."""


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a shell and nothing else; returns its cache folder."""
    (tmp_path / "bin").mkdir()
    monkeypatch.delenv("ISPC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "cache"


def pretend_apt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archives: list[Archive], distribution: str
) -> None:
    for name in ("apt-get", "dpkg-deb"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\necho 'E: no network' >&2\nexit 100\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setattr(ispc_toolchain, "_archive_version", lambda: (0, 0))
    monkeypatch.setattr(ispc_toolchain, "configured_archives", lambda scratch: archives)
    monkeypatch.setattr(ispc_toolchain, "_os_id", lambda: distribution)


def test_order(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_ispc(bare) is None
    private = fake_ispc(private_ispc(bare), "1.26.0")
    assert ensure_ispc(bare, ignore) == private
    on_path = fake_ispc(tmp_path / "bin" / "ispc", "1.22.0")
    assert ensure_ispc(bare, ignore) == on_path
    explicit = fake_ispc(tmp_path / "my-ispc", "1.30.1")
    monkeypatch.setenv("ISPC", str(explicit))
    assert ensure_ispc(bare, ignore) == explicit


def test_too_old(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = fake_ispc(private_ispc(bare), "1.26.0")
    old = fake_ispc(tmp_path / "bin" / "ispc", "1.16.1")
    messages: list[str] = []
    assert ensure_ispc(bare, messages.append) == private
    assert messages == [f"{old} is too old (ISPC 1.16)"]
    monkeypatch.setenv("ISPC", str(old))
    with pytest.raises(KernelBuildError, match=rf"is ISPC 1\.16; {ADVICE}"):
        ensure_ispc(bare, ignore)


def test_explicit_is_no_compiler(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISPC", "/no/such/ispc")
    with pytest.raises(KernelBuildError, match=rf"is not an executable file; {ADVICE}"):
        ensure_ispc(bare, ignore)
    monkeypatch.setenv("ISPC", "/bin/true")
    with pytest.raises(KernelBuildError, match=rf"does not answer as an ISPC compiler; {ADVICE}"):
        ensure_ispc(bare, ignore)


def test_no_apt(bare: Path) -> None:
    with pytest.raises(KernelBuildError, match=rf"no apt to install one with; {ADVICE}"):
        ensure_ispc(bare, ignore)


def test_unsupported_architecture(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(KernelBuildError, match=rf"for Linux on riscv64; {ADVICE}"):
        ensure_ispc(bare, ignore)


DEBIAN = [Archive(uri="http://mirror.invalid/debian", suite="bookworm")]


@pytest.mark.parametrize(
    ("archives", "distribution", "message"),
    [
        ([], "debian", "no package sources configured"),
        (DEBIAN, "ubuntu", "carries no recent ISPC"),
        (DEBIAN, "debian", "no network"),
    ],
)
def test_private_install_fails_cleanly(
    bare: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    archives: list[Archive],
    distribution: str,
    message: str,
) -> None:
    pretend_apt(tmp_path, monkeypatch, archives, distribution)
    monkeypatch.setattr(ispc_toolchain, "find_keyring", lambda suite: tmp_path / "keys.gpg")
    with pytest.raises(KernelBuildError, match=rf"{message}.*{ADVICE}"):
        ensure_ispc(bare, ignore)
    assert list((bare / "toolchains").iterdir()) == []


def test_no_keys(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_apt(tmp_path, monkeypatch, DEBIAN, "debian")
    monkeypatch.setattr(ispc_toolchain, "find_keyring", lambda suite: None)
    with pytest.raises(KernelBuildError, match=rf"no keys for Debian trixie.*{ADVICE}"):
        ensure_ispc(bare, ignore)


def test_no_disk(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_apt(tmp_path, monkeypatch, DEBIAN, "debian")
    monkeypatch.setattr(ispc_toolchain, "PRIVATE_BYTES", 1 << 60)
    with pytest.raises(KernelBuildError, match=rf"needs .* MiB are free; make room, or {ADVICE}"):
        ensure_ispc(bare, ignore)
