"""Environments of the peers: a virtual environment each, made on first use.

Everything lies under one folder that git ignores, but for vLLM's packages, which the tests with
vLLM have already (``.venv-vllm``), and llama.cpp's server, which takes long to build and is kept in
the user's cache folder.

Owns: the folder.  Thread-safety: one process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vmalloc.measuring.provenance import ROOT

FOLDER = ROOT / ".peers"
LLAMA_CPP = "0.3.36"
"""Version of llama-cpp-python, whose source distribution carries llama.cpp's."""
GGUF_PACKAGES = ("gguf==0.19.0", "safetensors==0.8.0")
Say = Callable[[str], None]


class Unavailable(Exception):
    """A peer cannot run here; the message says why."""


@dataclass
class Environments:
    """Finds or makes what peers need.

    Attributes:
        given: environments that exist already, by name.
        llama_server: the executable, if the caller knows it.
        can_build_llama_cpp: whether to build the server if there is none.
        say: told what takes long.
    """

    given: Mapping[str, Path] = field(default_factory=dict)
    llama_server: Path | None = None
    can_build_llama_cpp: bool = False
    say: Say = print

    def python(self, name: str) -> Path:
        """The interpreter of environment ``name``. Raises ``Unavailable``."""
        if name == "vmalloc":
            return Path(sys.executable)
        if name in self.given:
            return _interpreter(self.given[name])
        makers = {"transformers": self._share, "vllm": self._install_vllm, "llama": self._gguf}
        try:
            return makers[name]()
        except (OSError, subprocess.CalledProcessError) as error:
            raise Unavailable(f"environment {name}: {_last_words(error)}") from error

    def server(self) -> Path:
        """llama.cpp's server. Raises ``Unavailable``."""
        built = _cache_folder() / "build" / "bin" / "llama-server"
        found = shutil.which("llama-server")
        if self.llama_server is not None:
            return self.llama_server
        if found is not None:
            return Path(found)
        if not built.exists():
            if not self.can_build_llama_cpp:
                raise Unavailable("no llama-server; --build-llama-cpp builds it (a quarter hour)")
            try:
                build_llama_cpp(_cache_folder(), self.say)
            except (OSError, subprocess.CalledProcessError) as error:
                raise Unavailable(f"llama.cpp: {_last_words(error)}") from error
        return built

    def _share(self) -> Path:
        """torch and transformers of the running interpreter, and nothing of ours."""
        venv = _new_venv(FOLDER / "transformers", "--without-pip")
        link = _site_packages(venv) / "shared.pth"
        link.write_text("".join(f"{path}\n" for path in sys.path if path.endswith("-packages")))
        return _interpreter(venv)

    def _install_vllm(self) -> Path:
        venv = Path(os.environ.get("VLLM_VENV") or ROOT / ".venv-vllm")
        script = ROOT / "scripts" / "install_vllm.sh"
        _run([str(script), str(venv)], environment={"PYTHON": sys.executable}, say=self.say)
        return _interpreter(venv)

    def _gguf(self) -> Path:
        venv = _new_venv(FOLDER / "llama")
        stamp = venv / ".installed"
        if not stamp.exists():
            pip = [str(_interpreter(venv)), "-m", "pip", "install", "-q", *GGUF_PACKAGES]
            _run([*pip, "--disable-pip-version-check"])
            stamp.touch()
        return _interpreter(venv)


def build_llama_cpp(folder: Path, say: Say) -> None:
    """Build the server of the pinned version below ``folder``, at the lowest priority."""
    say(f"Building llama.cpp below {folder}: about 15 minutes of CPU time.")
    source = folder / "source"
    if not source.exists():
        _fetch_llama_cpp(source)
    cmake = _tool("cmake")
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "BUILD_SHARED_LIBS": "OFF",
        "GGML_NATIVE": "ON",
        "LLAMA_BUILD_TESTS": "OFF",
        "LLAMA_BUILD_EXAMPLES": "OFF",
        "LLAMA_BUILD_APP": "OFF",
        "LLAMA_USE_PREBUILT_UI": "OFF",
        "LLAMA_OPENSSL": "OFF",
        "CMAKE_MAKE_PROGRAM": _tool("ninja"),
    }
    defines = [f"-D{name}={value}" for name, value in options.items()]
    build = folder / "build"
    _run([cmake, "-S", str(source), "-B", str(build), "-G", "Ninja", *defines])
    _run(["nice", "-n", "19", cmake, "--build", str(build), "--target", "llama-server"])


def _fetch_llama_cpp(target: Path) -> None:
    """llama.cpp's source out of the distribution that carries it."""
    package = f"llama-cpp-python=={LLAMA_CPP}"
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
    with tempfile.TemporaryDirectory() as scratch:
        _run([*pip, package, "-d", scratch])
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(scratch)
        (carried,) = Path(scratch).glob("*/vendor/llama.cpp")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(carried, target)


def _cache_folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "vmalloc" / f"llama.cpp-{LLAMA_CPP}"


def _tool(name: str) -> str:
    """Of the running environment, else of the system."""
    beside = Path(sysconfig.get_path("scripts")) / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is not installed")
    return found


def _new_venv(path: Path, *options: str) -> Path:
    if not _interpreter(path).exists():
        base = getattr(sys, "_base_executable", sys.executable)
        _run([base, "-m", "venv", *options, str(path)])
    return path


def _interpreter(venv: Path) -> Path:
    return venv / "bin" / "python"


def _site_packages(venv: Path) -> Path:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return venv / "lib" / version / "site-packages"


def _run(
    command: list[str], *, environment: Mapping[str, str] | None = None, say: Say | None = None
) -> None:
    """Run to the end; what it says is told as it comes, if ``say`` is given."""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if say is not None:
                say(line.rstrip())
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command, "".join(lines[-20:]))


def _last_words(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError) and error.output:
        lines = [line for line in str(error.output).splitlines() if line.strip()]
        return f"{Path(error.cmd[0]).name}: {lines[-1]}" if lines else str(error)
    return str(error)
