"""A runtime is built once, whole or not at all, and what stands in the way is said."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from tiny_runtime import PYTHON, TINY, builder, environment, make_wheel

from hpc_gym.errors import UserError
from hpc_gym.runtimes.build import build_specs
from hpc_gym.runtimes.install import Event
from hpc_gym.runtimes.inventory import inventory
from hpc_gym.runtimes.spec import RuntimeSpec, is_built

GATE = """
import os, pathlib, time
gate = pathlib.Path(os.environ["GATE"])
gate.with_name("reached").touch()
while gate.exists():
    time.sleep(0.02)
"""
"""A package whose import takes as long as a file is there: the build can be caught in its midst."""


BUILD_TINY = "from tiny_runtime import TINY; from hpc_gym.runtimes.build import build_specs; build_specs([TINY])"


def environment_with_tiny() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    make_wheel(tmp_path / "wheels", "small_package", {"small_package/__init__.py": ""})
    return tmp_path


@pytest.fixture
def gate(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_wheel(home / "wheels", "small_package", {"small_package/__init__.py": GATE})
    monkeypatch.setenv("GATE", str(home / "gate"))
    (home / "gate").touch()
    return home / "gate"


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def log_of(spec: RuntimeSpec) -> str:
    return spec.root.with_name(f"{spec.root.name}.log").read_text()


def test_a_built_runtime_runs_its_packages_and_has_their_byte_code(home: Path) -> None:
    events: list[Event] = []
    build_specs([TINY], events.append)
    assert [event.stage for event in events if event.stage != "installing"] == ["creating", "checking", "ready"]
    assert is_built(TINY)
    subprocess.run([TINY.python, "-c", "import small_package"], check=True)
    assert list(TINY.root.glob("lib/python*/site-packages/small_package/__pycache__/*.pyc"))


def test_two_builders_at_once_build_once(gate: Path) -> None:
    first = builder(TINY, os.environ)
    wait_for(gate.with_name("reached"))
    second = builder(TINY, os.environ)
    assert second.stdout is not None
    assert second.stdout.readline().startswith("waiting")
    assert not is_built(TINY)
    gate.unlink()
    first_output, second_output = first.communicate(timeout=30)[0], second.communicate(timeout=30)[0]
    assert (first.returncode, second.returncode) == (0, 0)
    assert first_output.splitlines()[-1].startswith("ready built in")
    assert second_output.splitlines()[-1] == "ready built by another process"
    assert log_of(TINY).count("uv venv") == 1
    assert is_built(TINY)


def test_a_killed_build_is_not_used_and_is_made_again(gate: Path) -> None:
    killed = builder(TINY, os.environ)
    wait_for(gate.with_name("reached"))
    killed.kill()
    killed.communicate()
    assert TINY.root.exists()
    assert not is_built(TINY)
    (TINY.root / "remains").touch()

    again = builder(TINY, os.environ)
    assert again.stdout is not None
    # The killed builder's program still runs, and holds the lock: the folder is not cleared under its hands.
    assert again.stdout.readline().startswith("waiting")
    gate.unlink()
    output, _ = again.communicate(timeout=30)
    assert output.splitlines()[-1].startswith("ready built in")
    assert is_built(TINY)
    assert not (TINY.root / "remains").exists()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_build_leaves_nothing(gate: Path, stop: signal.Signals) -> None:
    # SIGTERM as `hpc-gym runtimes build` takes it.
    program = f"import signal; signal.signal(signal.SIGTERM, signal.default_int_handler); {BUILD_TINY}"
    building = subprocess.Popen([sys.executable, "-c", program], env=environment_with_tiny(), stderr=subprocess.DEVNULL)
    wait_for(gate.with_name("reached"))
    building.send_signal(stop)
    assert building.wait(30) != 0
    assert not TINY.root.exists()
    users = subprocess.run(["pgrep", "-f", str(TINY.python)], capture_output=True, text=True)
    assert users.stdout == ""


def test_a_second_run_starts_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_specs([TINY])
    monkeypatch.setattr(subprocess, "Popen", None)
    before = time.monotonic()
    events: list[Event] = []
    build_specs([TINY], events.append)
    assert events == [Event("tiny", "ready", text="already built")]
    assert time.monotonic() - before < 0.1


def test_runtimes_are_built_side_by_side(gate: Path) -> None:
    """The second is ready while the first still checks."""
    other = dataclasses.replace(TINY, name="other", imports=("json",))

    def open_gate(event: Event) -> None:
        if (event.runtime, event.stage) == ("other", "ready"):
            gate.unlink()

    build_specs([TINY, other], open_gate)
    assert is_built(TINY)
    assert is_built(other)


def test_no_such_python_says_where_it_looked(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYENV_ROOT", str(home / "my-pyenv"))
    with pytest.raises(UserError, match=r"runtime tiny needs Python 3\.99") as caught:
        build_specs([dataclasses.replace(TINY, pythons=("3.99",))])
    assert "my-pyenv/versions" in str(caught.value)
    assert "uv python install 3.99" in str(caught.value)


def test_too_little_space_is_said_before_anything_is_written(home: Path) -> None:
    large = dataclasses.replace(TINY, disk_mib=10**9)
    with pytest.raises(UserError, match=r"no space for tiny: 1000000000 MiB needed, \d+ MiB free"):
        build_specs([large])
    assert not large.root.exists()


def test_space_that_runs_out_on_the_way_is_said(home: Path) -> None:
    """On a file system of 2 MiB, in a mount namespace of its own."""
    make_wheel(home / "wheels", "small_package", {"small_package/__init__.py": "", "data.bin": os.urandom(4 << 20)})
    cache = home / "cache"
    cache.mkdir()
    program = f"mount -t tmpfs -o size=2m none {cache} && exec {sys.executable} -c '{BUILD_TINY}'"
    run = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "bash", "-c", program],
        env=environment_with_tiny(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    if "unshare" in run.stderr or "mount:" in run.stderr:
        pytest.skip(f"no mount namespaces for us here: {run.stderr.strip()}")
    assert "UserError: runtime tiny: no space left" in run.stderr
    assert "HPC_GYM_CACHE" in run.stderr


def test_an_index_that_does_not_answer_is_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(home / "wheels")
    (home / "wheels").mkdir()
    monkeypatch.delenv("UV_NO_INDEX")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    with pytest.raises(UserError, match="no package index could be reached") as caught:
        build_specs([TINY])
    assert "127.0.0.1:1" in str(caught.value)
    assert not TINY.root.exists()


def test_a_missing_compiler_is_said(home: Path) -> None:
    """The words are those of setuptools, for a package that only exists as source."""
    said = "error: [Errno 2] No such file or directory: 'gcc'"
    backend = f"def build_wheel(*arguments): raise SystemExit({said!r})\n"
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    shutil.rmtree(home / "wheels")
    (home / "wheels").mkdir()
    with tarfile.open(home / "wheels" / "small_package-1.0.tar.gz", "w:gz") as source:
        metadata = "Metadata-Version: 2.2\nName: small_package\nVersion: 1.0\n"
        for name, text in (("PKG-INFO", metadata), ("pyproject.toml", project), ("backend.py", backend)):
            entry = tarfile.TarInfo(f"small_package-1.0/{name}")
            entry.size = len(text)
            source.addfile(entry, io.BytesIO(text.encode()))
    with pytest.raises(UserError, match="there is no C compiler"):
        build_specs([TINY])


def test_a_package_that_does_not_import_is_no_runtime(home: Path) -> None:
    make_wheel(home / "wheels", "small_package", {"small_package/__init__.py": "raise RuntimeError('needs AVX2')"})
    with pytest.raises(UserError, match=r"could not import what its programs need \(exit code 1\)") as caught:
        build_specs([TINY])
    assert "needs AVX2" in str(caught.value)
    assert not TINY.root.exists()
    assert "needs AVX2" in log_of(TINY)


def test_a_lock_is_installed_as_it_stands(home: Path) -> None:
    """Dependencies are not looked at again: what an override has left out stays out."""
    make_wheel(home / "wheels", "small_package", {"small_package/__init__.py": ""}, requires="nowhere-to-be-found")
    build_specs([TINY])
    assert is_built(TINY)


def test_a_provided_distribution_has_its_version(home: Path) -> None:
    spec = dataclasses.replace(TINY, provides={"other-name": "1.0+cpu"})
    build_specs([spec])
    ask = "import importlib.metadata as m; print(m.version('other-name'))"
    answer = subprocess.run([spec.python, "-c", ask], capture_output=True, text=True, check=True)
    assert answer.stdout == "1.0+cpu\n"


def test_every_server_has_the_runtime_as_its_venv(home: Path) -> None:
    """NeMo Gym takes a server's venv as prepared when it has bin/python and bin/activate."""
    files = {"small_package/__init__.py": "", "resources_servers/one/app.py": "", "responses_api_agents/two/app.py": ""}
    make_wheel(home / "wheels", "small_package", files)
    spec = dataclasses.replace(TINY, link_servers=True)
    build_specs([spec])
    for server in ("resources_servers/one", "responses_api_agents/two"):
        venv = spec.root / "servers" / server / ".venv"
        assert venv.resolve() == spec.root.resolve()
        assert (venv / "bin" / "python").exists()
        assert (venv / "bin" / "activate").exists()


def test_the_list_tells_old_runtimes_from_those_in_use(home: Path) -> None:
    build_specs([TINY])
    states = {each.name: each for each in inventory()}
    assert states["gym"].state == "not built"
    assert states["tiny"].state == "outdated"
    assert states["tiny"].python.startswith(PYTHON)
    assert states["tiny"].lock == TINY.digest
