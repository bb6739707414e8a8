"""Building: up to date, forced, broken, without ISPC, read-only; and what was built."""

import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cpu_kernels import build as build_module
from cpu_kernels.build import build, export_ispc_objects, find_built, is_built, load
from cpu_kernels.command_log import CommandLog
from cpu_kernels.errors import KernelBuildError
from cpu_kernels.ispc_toolchain import ensure_ispc

pytestmark = pytest.mark.ispc


@pytest.fixture
def no_ispc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither `$ISPC`, nor `ispc` on PATH, nor any way to install one."""
    monkeypatch.delenv("ISPC", raising=False)
    monkeypatch.setattr(build_module, "find_ispc", lambda cache_dir: None)

    def refuse(*arguments: object) -> Path:
        raise AssertionError("ISPC was asked for")

    monkeypatch.setattr(build_module, "ensure_ispc", refuse)


@pytest.fixture
def fast_build(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One instruction set and next to nothing in the sources: only the build is under test."""
    targets = {"x86_64": ("avx2-i32x8",), "aarch64": ("neon-i32x8",)}
    monkeypatch.setattr(build_module, "ISPC_TARGETS", targets)
    folder = tmp_path_factory.mktemp("sources")
    (folder / "csrc").mkdir()
    for path in build_module.source_files():
        copy = folder / path.relative_to(build_module.SOURCE_DIR)
        if path.suffix == ".ispc":
            copy.write_text(f"export void {path.stem}() {{}}\n")
        else:
            copy.write_text("" if path.suffix in (".cpp", ".h", ".isph") else path.read_text())
    monkeypatch.setattr(build_module, "SOURCE_DIR", folder)


def use_toolchain_of(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let builds in other cache folders use the ISPC that this one found or installed."""
    monkeypatch.setenv("ISPC", str(ensure_ispc(cache_dir, lambda message: None)))


def test_up_to_date_does_nothing_and_is_fast(kernel_cache: Path) -> None:
    messages: list[str] = []
    module = build(kernel_cache, on_progress=messages.append)
    before = module.stat()
    started = time.perf_counter()
    assert build(kernel_cache, on_progress=messages.append) == module
    assert time.perf_counter() - started < 0.05
    assert messages == []
    assert module.stat() == before
    assert is_built(kernel_cache) == find_built(kernel_cache) == module


@pytest.mark.slow
@pytest.mark.usefixtures("fast_build")
def test_build_force_and_concurrent_builds(
    kernel_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_toolchain_of(kernel_cache, monkeypatch)
    assert is_built(tmp_path) is None
    built: list[Path] = []
    messages: list[str] = []
    threads = [
        threading.Thread(target=lambda: built.append(build(tmp_path, on_progress=messages.append)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 2
    assert built[0] == built[1] == is_built(tmp_path)
    assert messages.count("compiling the CPU kernels") == 1
    first = built[0].stat().st_mtime_ns
    assert build(tmp_path, force=True) == built[0]
    assert built[0].stat().st_mtime_ns > first
    assert not list((tmp_path / "cpu_kernels").glob(".build-*"))


@pytest.mark.slow
@pytest.mark.usefixtures("no_ispc")
def test_prebuilt_objects_need_no_ispc(kernel_cache: Path, tmp_path: Path) -> None:
    objects = export_ispc_objects(kernel_cache, tmp_path / "objects")
    cache_dir = tmp_path / "cache"
    module = build(cache_dir, ispc_objects=objects)
    assert build(cache_dir, ispc_objects=objects) == module
    assert build(cache_dir) == find_built(cache_dir) == module
    script = (
        "import sys; from pathlib import Path; from cpu_kernels.selftest import run_selftest\n"
        "assert all(result.passed for result in run_selftest(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", script, str(cache_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_objects_of_other_sources_are_refused(kernel_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(KernelBuildError, match=r"holds no ISPC objects"):
        build(tmp_path, ispc_objects=tmp_path)
    objects = export_ispc_objects(kernel_cache, tmp_path / "objects")
    (objects / "sources").write_text("something else")
    with pytest.raises(KernelBuildError, match=r"were built from other sources$"):
        build(tmp_path, ispc_objects=objects)


def test_missing_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(KernelBuildError, match=r"^CXX=no-such-compiler is not an executable"):
        build(tmp_path, force=True)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelBuildError, match=r"^no C\+\+ compiler: install one .*apt install"):
        build(tmp_path, force=True)


@pytest.mark.usefixtures("fast_build")
def test_broken_compiler_shows_its_words_and_leaves_nothing(
    kernel_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = export_ispc_objects_of(kernel_cache, tmp_path, monkeypatch)
    broken = tmp_path / "broken-g++"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1: error: out of order today' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(KernelBuildError, match=r"error: out of order today \(log: ") as caught:
        build(tmp_path, ispc_objects=objects)
    assert "\n" not in str(caught.value)
    assert "out of order" in (tmp_path / "cpu_kernels" / "build.log").read_text()
    assert find_built(tmp_path) is None


def export_ispc_objects_of(
    kernel_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Objects that pass for those of the present flags."""
    found = next(kernel_cache.glob("cpu_kernels/*/ispc"))
    objects = Path(shutil.copytree(found, tmp_path / "objects"))
    (objects / "sources").write_text(build_module._ispc_key())
    return objects


def test_performance_warning_is_an_error(tmp_path: Path) -> None:
    report = CommandLog(tmp_path / "log", False, lambda message: None)
    with pytest.raises(KernelBuildError, match=r"Performance Warning: Gather required"):
        report.run(["echo", "a.ispc:1:1: Performance Warning: Gather required to load value."])


def test_unwritable_cache(kernel_cache: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    objects = export_ispc_objects(kernel_cache, tmp_path / "objects")
    with pytest.raises(KernelBuildError, match=r"^cannot write to .*; set NEO_CACHE_DIR"):
        build(blocked, ispc_objects=objects)


def test_load_before_build(tmp_path: Path) -> None:
    with pytest.raises(KernelBuildError, match=r"^CPU kernels are not built: run `neo build-ker"):
        load(tmp_path)


def test_load_returns_the_same_module(kernel_cache: Path) -> None:
    assert load(kernel_cache) is load(kernel_cache)


def disassemble(objects: Path) -> str:
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", *sorted(map(str, objects.glob("*.o")))],
        capture_output=True,
        text=True,
        check=True,
    )
    return listing.stdout


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the names are those of x86-64")
def test_no_gathers_or_scatters(kernel_cache: Path) -> None:
    listing = disassemble(build(kernel_cache).parent / "ispc")
    assert "vfmadd231ps" in listing
    assert re.findall(r"\tv(?:p?gather|p?scatter)\w+", listing) == []


@pytest.fixture(scope="module")
def ispc_for_arm(kernel_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every ISPC source compiled for AArch64, and with its header."""
    folder = tmp_path_factory.mktemp("arm")
    ispc = ensure_ispc(kernel_cache, lambda message: None)
    for source in sorted((build_module.SOURCE_DIR / "csrc").glob("*.ispc")):
        output = folder / f"{source.stem}.o"
        command = [ispc, source, "--arch=aarch64", "--target=neon-i32x8", "--pic"]
        command += [*build_module.ISPC_FLAGS, "-o", output, "-h", folder / f"{source.stem}_ispc.h"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
    return folder


def is_arm_object(path: Path) -> bool:
    return path.read_bytes()[18] == 0xB7  # the machine field of an ELF file


def test_ispc_compiles_for_arm(ispc_for_arm: Path) -> None:
    objects = list(ispc_for_arm.glob("*.o"))
    assert objects
    assert all(map(is_arm_object, objects))


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None, reason="needs g++-aarch64-linux-gnu"
)
def test_cpp_compiles_for_arm(ispc_for_arm: Path, tmp_path: Path) -> None:
    """All but the bindings, which need the Python headers of an Arm machine."""
    for source in sorted((build_module.SOURCE_DIR / "csrc").glob("*.cpp")):
        if source.stem.startswith("bindings"):
            continue
        output = tmp_path / f"{source.stem}.cpp.o"
        command = ["aarch64-linux-gnu-g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror"]
        command += ["-fPIC", "-I", ispc_for_arm, "-c", source, "-o", output]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert is_arm_object(output)


def test_is_built_does_not_need_ispc_to_run(
    kernel_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "ispc"
    fake.write_text("#!/bin/sh\ntouch ran\n")
    fake.chmod(0o755)
    monkeypatch.setenv("ISPC", str(fake))
    monkeypatch.chdir(tmp_path)
    assert is_built(kernel_cache) is None
    assert find_built(kernel_cache) is not None
    assert "ran" not in os.listdir()
