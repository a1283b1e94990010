"""Doctor: what is broken is summary_lines and breaks nothing, what is required decides the exit status."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastrdm.commands import doctor
from fastrdm.commands.doctor import Package, imports, summary_lines

GOOD = Package("torch", "2.11", "", "2.14.1", "")
NO_COMPILER = {"c++": "", "nvcc": "", "triton": ""}


def give(monkeypatch: pytest.MonkeyPatch, *packages: Package) -> None:
    monkeypatch.setattr(doctor, "installed", lambda: list(packages))
    monkeypatch.setattr(doctor, "_version_of", lambda *_: "")
    monkeypatch.setattr(doctor, "imports", lambda names: dict.fromkeys(names, ("3.8.0", "")))


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules this process and its children find."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_broken_module_takes_no_other_down(modules: Path) -> None:
    sources = {
        "whole": "__version__ = '1.5'",
        "raises": "raise OSError('libnpp.so.13: cannot open\\nmore')",
        "crashes": "import os; print('dummy_batch'); os.abort()",
        "leaves": "import sys; sys.exit(3)",
        "hangs": "import time; time.sleep(60)",
        "last": "__version__ = 2",
    }
    for name, source in sources.items():
        (modules / f"{name}.py").write_text(source)
    found = imports(["whole", "raises", "crashes", "leaves", "absent", "hangs", "last"], seconds=4)
    assert found["whole"] == ("1.5", "")
    assert found["raises"] == ("", "OSError: libnpp.so.13: cannot open")
    assert found["crashes"] == ("", "its import ended Python with status -6")
    assert found["leaves"][1].startswith("SystemExit")
    assert found["absent"][1] == "ModuleNotFoundError: No module named 'absent'"
    assert found["hangs"] == ("", "its import did not end in 4 s")
    assert found["last"] == ("2", "")


def test_an_older_version_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [("torch", "2.11", ""), ("numpy", "1.26", ""), ("wandb", "", "wandb")]
    versions = {"torch": ("2.9.1+cpu", ""), "numpy": ("1.26", ""), "wandb": ("", "ModuleNotFoundError: wandb")}
    monkeypatch.setattr(doctor, "wanted", lambda: asked)
    monkeypatch.setattr(doctor, "imports", lambda names: {name: versions[name] for name in names})
    monkeypatch.setattr(doctor, "_distribution", lambda name: "")
    torch, numpy, wandb = doctor.installed()
    assert torch.problem == "2.9.1+cpu is older than 2.11"
    assert numpy.problem == ""
    assert wandb.problem == "ModuleNotFoundError: wandb"


def test_what_is_asked_for_comes_from_the_package_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2.11", 'nvidia-dali-cuda130>=2.2; extra == "dali"', 'pytest>=8; extra == "dev"', "PyYAML"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: lines)
    assert doctor.wanted() == [("torch", "2.11", ""), ("nvidia-dali-cuda130", "2.2", "dali"), ("pyyaml", "", "")]
    assert [doctor.module_of(name) for name, *_ in doctor.wanted()] == ["torch", "nvidia.dali", "yaml"]


@pytest.mark.parametrize(
    ("folder", "note"),
    [
        ("multi_tensor_apply", "NVIDIA's, for optim.backend=apex"),
        ("views", "PyPI's package of that name, not NVIDIA's"),
    ],
)
def test_apex_is_told_apart_without_importing_it(modules: Path, folder: str, note: str) -> None:
    (modules / "apex" / folder).mkdir(parents=True)
    (modules / "apex" / "__init__.py").write_text("raise ImportError('No module named pyramid')")
    assert note in doctor.apex()


def test_no_apex_needs_no_note() -> None:
    assert doctor.apex(lambda name: None) == ""


@pytest.mark.parametrize(
    ("packages", "arguments", "status"),
    [
        ([GOOD], [], 0),
        ([GOOD, Package("ffcv", "1", "ffcv", "", "not there")], [], 0),
        ([GOOD, Package("ffcv", "1", "ffcv", "", "not there")], ["--require", "ffcv"], 1),
        ([GOOD, Package("ffcv", "1", "ffcv", "1.0.2", "")], ["--require", "ffcv"], 0),
        ([GOOD], ["--require", "c++"], 1),
        ([GOOD, Package("numpy", "1", "", "", "not there")], [], 1),
        ([Package("torch", "2.11", "", "", "ImportError: libcuda")], [], 1),
        ([], [], 1),
    ],
)
def test_exit_status(
    packages: list[Package], arguments: list[str], status: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    give(monkeypatch, *packages)
    assert doctor.main(arguments) == status
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == ("not all that is needed works" if status else "all that a run needs works")


def test_missing_things_come_with_their_command(monkeypatch: pytest.MonkeyPatch) -> None:
    give(
        monkeypatch,
        GOOD,
        Package("numpy", "1.26", "", "", "not there"),
        Package("ffcv", "1.0.2", "ffcv", "", "not there"),
        Package("nvidia-dali-cuda130", "2.2", "dali", "", "not there"),
    )
    found = doctor.examine()
    assert found["broken"] == ["numpy: not there; pip install 'numpy>=1.26'"]
    commands = {m["what"]: m["command"] for m in found["missing"]}
    assert commands["ffcv"].startswith("apt-get install libopencv-dev libturbojpeg0-dev pkg-config && ")
    assert commands["ffcv"].endswith("pip install 'fastrdm[ffcv]'")
    assert commands["dali"] == "pip install 'fastrdm[dali]'"
    assert commands["c++"] == "apt-get install g++"


def test_a_name_that_cannot_be_required_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, GOOD)
    with pytest.raises(ValueError, match=r"--require takes cuda, .*, got dalli"):
        doctor.main(["--require", "cuda,dalli"])


def fake_torch(devices: int, error: Exception | None = None, bf16: bool = False) -> Any:
    def properties(i: int) -> SimpleNamespace:
        if error:
            raise error
        return SimpleNamespace(name="H100", major=9, minor=0, total_memory=80 * 2**30)

    cuda = SimpleNamespace(device_count=lambda: devices, get_device_properties=properties)
    return SimpleNamespace(
        cuda=cuda,
        cpu=SimpleNamespace(get_capabilities=lambda: {"avx512_bf16": bf16}),
        backends=SimpleNamespace(cpu=SimpleNamespace(get_cpu_capability=lambda: "AVX2")),
        version=SimpleNamespace(cuda="13.0"),
    )


def test_devices_and_what_they_make_possible() -> None:
    devices = doctor.devices_of(fake_torch(2))
    assert devices["cuda"] == [{"name": "H100", "gib": 80.0, "capability": "9.0", "bf16": True}] * 2
    works = doctor.abilities([], devices, {**NO_COMPILER, "triton": "3.8.0"})
    assert works == {"cuda": True, "bf16": True, "triton": True, "compile": True, "c++": False, "nvcc": False}
    assert doctor.used(devices, NO_COMPILER, works)["torch.compile"] == "through Triton"
    on_cpu = doctor.abilities([], doctor.devices_of(fake_torch(0)), {**NO_COMPILER, "triton": "3.8.0"})
    assert not any(on_cpu.values())
    for bf16, said in ((True, "bf16"), (False, "slow")):
        assert doctor.used(doctor.devices_of(fake_torch(0, bf16=bf16)), NO_COMPILER, on_cpu)["16-bit training"] == said


def test_a_failing_driver_is_told() -> None:
    devices = doctor.devices_of(fake_torch(1, RuntimeError("The NVIDIA driver is too old\nat line")))
    assert devices["cuda"] == []
    assert devices["problem"] == "RuntimeError: The NVIDIA driver is too old"


def test_this_machine_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-secret")
    doctor.main(["--json"])
    out = capsys.readouterr().out
    found = json.loads(out)
    assert found["ok"] == (not found["broken"])
    torch = next(p for p in found["packages"] if p["name"] == "torch")
    assert torch["problem"] == ""
    assert found["engines"]["native"]
    assert found["used"]["SyncBN"].startswith("fastrdm's own")
    assert "a-secret" not in out
    assert any(line.startswith("ok torch") for line in summary_lines({**found, "required": []}))
