"""Build the CPU kernels into a cache folder, and load what was built.

A build lives in `<cache_dir>/cpu_kernels/<sources>-<compilers>/`: the module and, in `ispc/`, the
ISPC objects and headers it was linked from. The first half of the name is a hash of sources, flags
and Python ABI, the second one of the compilers; so a build is never stale, only absent. Folders
appear complete or not at all.
"""

import contextlib
import fcntl
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from cpu_kernels.command_log import CommandLog
from cpu_kernels.compilers import (
    digest,
    find_cxx,
    find_tool,
    identity,
    include_dirs,
    pybind11_cmake_dir,
    python_abi,
)
from cpu_kernels.errors import KernelBuildError
from cpu_kernels.ispc_toolchain import ensure_ispc, find_ispc

SOURCE_DIR = Path(__file__).parent
MODULE_NAME = "cpu_kernels._native"
MODULE_FILE = "_native.so"
ISPC_TARGETS = {
    "x86_64": ("avx2-i32x8", "avx512skx-x16", "avx512spr-x16"),
    "aarch64": ("neon-i32x8",),
}
CXX_FLAGS = ("-std=c++17", "-O3", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-g0")
ISPC_FLAGS = ("-O3", "--werror")
NOT_BUILT = "CPU kernels are not built: run `neo build-kernels`"

Progress = Callable[[str], None]


def _silent(message: str) -> None:
    """Ignore a progress message."""


def source_files() -> list[Path]:
    """Return the files that the kernels are made from, in a fixed order."""
    csrc = sorted(path for path in (SOURCE_DIR / "csrc").iterdir() if not path.name.startswith("."))
    return [SOURCE_DIR / "CMakeLists.txt", *csrc]


def ispc_targets() -> tuple[str, ...]:
    """Return the ISPC targets of this machine's architecture.

    Raises:
        KernelBuildError: The architecture is not supported.
    """
    machine = platform.machine()
    if machine not in ISPC_TARGETS:
        raise KernelBuildError(f"the CPU kernels support {', '.join(ISPC_TARGETS)}, not {machine}")
    return ISPC_TARGETS[machine]


def _source_key() -> str:
    """Return the hash of everything but the compilers."""
    flags = " ".join((*ispc_targets(), *CXX_FLAGS, *ISPC_FLAGS, python_abi()))
    return digest(flags, *(path.read_bytes() for path in source_files()))


def _root(cache_dir: Path) -> Path:
    return cache_dir / "cpu_kernels"


def _folder(cache_dir: Path, *compilers: str) -> Path:
    """Return the folder of the build made by these compilers, whether it exists or not."""
    return _root(cache_dir) / f"{_source_key()}-{digest(*compilers)}"


def is_built(cache_dir: Path) -> Path | None:
    """Return the module that the sources and the compilers found now would make, if it is built."""
    ispc = find_ispc(cache_dir)
    if ispc is None:
        return find_built(cache_dir)
    module = _folder(cache_dir, identity(find_cxx()), identity(ispc)) / MODULE_FILE
    return module if module.exists() else None


def find_built(cache_dir: Path) -> Path | None:
    """Return the newest module built from the present sources by any compilers, or None."""
    found = _root(cache_dir).glob(f"{_source_key()}-*/{MODULE_FILE}")
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def load(cache_dir: Path) -> ModuleType:
    """Import the built kernels; a second call returns the same module.

    Raises:
        KernelBuildError: They are not built, or cannot be loaded.
    """
    path = find_built(cache_dir)
    if path is None:
        raise KernelBuildError(NOT_BUILT)
    loaded = sys.modules.get(MODULE_NAME)
    if loaded is not None and Path(str(loaded.__file__)).parent.name == path.parent.name:
        return loaded
    if loaded is not None:
        raise KernelBuildError("CPU kernels were rebuilt while in use: start a new process")
    spec = importlib.util.spec_from_file_location(MODULE_NAME, path)
    assert spec is not None
    assert spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise KernelBuildError(
            f"cannot load the CPU kernels: {error}; run `neo build-kernels --force`"
        ) from error
    sys.modules[MODULE_NAME] = module
    return module


def build(
    cache_dir: Path,
    *,
    force: bool = False,
    verbose: bool = False,
    ispc_objects: Path | None = None,
    on_progress: Progress = _silent,
) -> Path:
    """Build the kernels unless they are up to date.

    Args:
        cache_dir: Folder for builds and, if none is installed, the ISPC compiler.
        force: Build even if up to date.
        verbose: Report every line of the compilers' output.
        ispc_objects: Folder that `export_ispc_objects` wrote on a machine of the same architecture,
            from the same sources; no ISPC is needed then.
        on_progress: Called with one line of text before and during slow parts.

    Returns:
        The path of the built module.

    Raises:
        KernelBuildError: Something is missing or fails; one line that says what to do.
    """
    if ispc_objects is None and not force and (built := is_built(cache_dir)) is not None:
        return built
    cxx = find_cxx()
    if ispc_objects is None:
        ispc = ensure_ispc(cache_dir, on_progress)
        folder = _folder(cache_dir, identity(cxx), identity(ispc))
    else:
        folder = _folder(cache_dir, identity(cxx), _objects_key(ispc_objects))
    module = folder / MODULE_FILE
    if module.exists() and not force:
        return module
    with _workplace(cache_dir, on_progress) as temp:
        if module.exists() and not force:
            return module
        on_progress("compiling the CPU kernels")
        log = _root(cache_dir) / "build.log"
        report = CommandLog(log, verbose, on_progress)
        if ispc_objects is None:
            _build_with_cmake(temp, cxx, ispc, report)
        else:
            _build_from_objects(temp, cxx, ispc_objects, report)
        if folder.exists():
            folder.rename(temp / "replaced")
        (temp / "result").rename(folder)
    return module


def export_ispc_objects(cache_dir: Path, dest: Path, *, on_progress: Progress = _silent) -> Path:
    """Write the ISPC objects and headers to `dest`, for `build(ispc_objects=...)` elsewhere.

    Raises:
        KernelBuildError: The kernels cannot be built here, or `dest` cannot be written.
    """
    module = build(cache_dir, on_progress=on_progress)
    try:
        shutil.copytree(module.parent / "ispc", dest, dirs_exist_ok=True)
    except OSError as error:
        raise KernelBuildError(f"cannot write ISPC objects to {dest}: {error.strerror}") from error
    return dest


def _objects_key(objects: Path) -> str:
    """Return the hash of prebuilt ISPC objects, after checking that they fit these sources."""
    stamp = objects / "sources"
    if not stamp.is_file():
        raise KernelBuildError(
            f"{objects} holds no ISPC objects: write it with `neo build-kernels` where ISPC runs"
        )
    if stamp.read_text() != _ispc_key():
        raise KernelBuildError(f"the ISPC objects in {objects} were built from other sources")
    return digest(*(path.read_bytes() for path in sorted(objects.iterdir())))


def _ispc_key() -> str:
    """Return the hash of everything that ISPC objects depend on, but the compiler."""
    sources = [path for path in source_files() if path.suffix in (".ispc", ".isph")]
    sources.append(SOURCE_DIR / "csrc" / "shapes.h")
    flags = " ".join((*ispc_targets(), *ISPC_FLAGS))
    return digest(flags, *(path.read_bytes() for path in sources))


@contextlib.contextmanager
def _workplace(cache_dir: Path, on_progress: Progress) -> Iterator[Path]:
    """Hold the cache's build lock and yield a temporary folder inside it."""
    root = _root(cache_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / ".lock").open("w")
    except OSError as error:
        raise KernelBuildError(
            f"cannot write to {root}: {error.strerror}; set NEO_CACHE_DIR to a writable folder"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_progress("waiting for another build to finish")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left_over in root.glob(".build-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".build-") as temp:
            yield Path(temp)


def _build_with_cmake(temp: Path, cxx: Path, ispc: Path, report: CommandLog) -> None:
    """Compile everything into `temp/result`."""
    include_dirs()
    settings = {
        "CMAKE_BUILD_TYPE": "None",
        "CMAKE_CXX_COMPILER": cxx,
        "CMAKE_ISPC_COMPILER": ispc,
        "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11_cmake_dir(),
        "NEO_ISPC_TARGETS": ";".join(ispc_targets()),
        "NEO_CXX_FLAGS": ";".join(CXX_FLAGS),
        "NEO_ISPC_FLAGS": ";".join(ISPC_FLAGS),
    }
    cmake, tree = str(find_tool("cmake")), temp / "tree"
    options = [f"-D{key}={value}" for key, value in settings.items()]
    report.run([cmake, "-G", "Ninja", "-S", str(SOURCE_DIR), "-B", str(tree), *options])
    report.run([cmake, "--build", str(tree)])
    ispc_dir = temp / "result" / "ispc"
    ispc_dir.mkdir(parents=True)
    for pattern in ("*ispc*.o", "*_ispc*.h"):
        for path in (tree / "CMakeFiles" / "_native.dir").rglob(pattern):
            shutil.copy(path, ispc_dir)
    (ispc_dir / "sources").write_text(_ispc_key())
    shutil.copy(next(tree.glob("_native*.so")), temp / "result" / MODULE_FILE)


def _build_from_objects(temp: Path, cxx: Path, objects: Path, report: CommandLog) -> None:
    """Compile the C++ sources and link them with prebuilt ISPC objects into `temp/result`."""
    result = temp / "result"
    shutil.copytree(objects, result / "ispc")
    folders = [f"-I{path}" for path in (SOURCE_DIR / "csrc", result / "ispc")]
    folders += [f"-isystem{path}" for path in include_dirs()]

    def compile_source(source: Path) -> str:
        output = str(temp / f"{source.stem}.o")
        command = [str(cxx), *CXX_FLAGS, "-fPIC", "-pthread", *folders, "-c", str(source)]
        report.run([*command, "-o", output])
        return output

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = [path for path in source_files() if path.suffix == ".cpp"]
        compiled = list(pool.map(compile_source, sources))
    linked = [str(path) for path in sorted((result / "ispc").glob("*.o"))]
    command = [str(cxx), "-shared", "-pthread", *compiled, *linked]
    report.run([*command, "-o", str(result / MODULE_FILE)])
