"""With and without the CUDA backend, on a machine without a GPU: the CPU serves, and an error says what is missing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import flexcore as fc
from flexcore import _core, _ops, cli

MODULES = [Path(_core.__file__), Path(_ops.__file__)]
NO_BACKEND = "this build of flexcore has no CUDA backend"
NO_DEVICE = "no NVIDIA driver was found|no CUDA-capable device is detected|.*driver.*"
NOT_THERE = f"^device: cuda, but ({NO_BACKEND}|{NO_DEVICE}); wanted cpu$"

without_gpu = pytest.mark.skipif(
    any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists(), reason="this machine has a GPU"
)


@without_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:3"])
def test_cuda_is_a_device_error(device: str, numpy_model: Path) -> None:
    with pytest.raises(fc.DeviceError, match=NOT_THERE):
        fc.Engine(numpy_model, fc.EngineConfig(device=device))


@without_gpu
def test_the_environment_names_a_device(numpy_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXCORE_DEVICE", "cuda")
    with pytest.raises(fc.DeviceError, match=NOT_THERE):
        fc.Engine(numpy_model)
    engine = fc.Engine(numpy_model, fc.EngineConfig(device="cpu"))  # what the caller says is stronger
    assert engine.model().device == "cpu"


@without_gpu
def test_auto_serves_on_the_cpu(numpy_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLEXCORE_DEVICE", raising=False)
    engine = fc.Engine(numpy_model, fc.EngineConfig(max_model_len=64, num_threads=1))
    assert engine.model().device == "cpu"
    engine.submit_batch([[1, 2, 3]], fc.SamplingParams(max_tokens=4, ignore_eos=True))
    tokens = 0
    while engine.has_work():
        tokens += len(engine.step().outputs)
    assert tokens == 4


@without_gpu
def test_an_error_leaves_nothing_behind(numpy_model: Path) -> None:
    for _ in range(3):
        with pytest.raises(fc.DeviceError):
            fc.Engine(numpy_model, fc.EngineConfig(device="cuda"))
        assert fc.Engine(numpy_model, fc.EngineConfig(device="auto", max_model_len=64)).model().device == "cpu"


def test_doctor_tells_of_cuda(tmp_path: Path) -> None:
    file = tmp_path / "doctor.json"
    assert cli.main(["doctor", "--json", str(file)]) == 0
    rows = {row["what"]: row for row in json.loads(file.read_text())}
    assert re.match("in this build|not in this build", rows["cuda"]["value"])
    assert rows["sanity run"]["status"] == "ok"


@without_gpu
def test_doctor_tells_what_is_missing(tmp_path: Path, numpy_model: Path) -> None:
    file = tmp_path / "doctor.json"
    cli.main(["doctor", "--json", str(file)])
    row = next(row for row in json.loads(file.read_text()) if row["what"] == "cuda")
    assert row["status"] == "missing"
    with pytest.raises(fc.DeviceError) as error:
        fc.Engine(numpy_model, fc.EngineConfig(device="cuda"))
    if NO_BACKEND in str(error.value):
        assert row["value"] == "not in this build: it was built without nvcc"
    else:
        assert re.fullmatch(f"in this build, but not usable here: ({NO_DEVICE})", row["value"])


def listing(*command: str | Path) -> str:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not here")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# The driver and the vendor's libraries are looked for when a GPU is used, so that the same files run everywhere.
@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name.split(".")[0])
def test_modules_need_no_cuda_library(module: Path) -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", listing("readelf", "-d", module))
    assert needed
    assert not [name for name in needed if re.search("cuda|cublas|nv", name)]


# Another library's CUDA runtime in the same process, torch's for one, is neither used nor replaced.
@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name.split(".")[0])
def test_modules_keep_their_cuda_runtime_to_themselves(module: Path) -> None:
    names = [line.split()[-1] for line in listing("nm", "-D", "--defined-only", module).splitlines()]
    assert names
    assert not [name for name in names if "cuda" in name.lower()]
