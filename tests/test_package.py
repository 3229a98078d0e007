import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]


def python(program: str, folder: Path, **kwargs) -> str:
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=300, **kwargs
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_imports_nothing_but_torch_and_what_lightning_does(tmp_path):
    program = """
import sys, lightning.pytorch, torchvision.datasets
before = set(sys.modules)
from lit_threeseven import LitThreeSeven, ThreeSevenDataModule
print(*sorted(name for name in set(sys.modules) - before if name.split(".")[0] not in ("lit_threeseven", "torch")))
"""
    assert python(program, tmp_path).split() == []


@pytest.mark.slow
def test_wheel_holds_the_data_and_trains_when_installed_elsewhere(tmp_path):
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(PROJECT)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 4_500_000
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lit_threeseven"}
    assert "lit_threeseven/use/page.html" in names
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path / "site")!r})
import lit_threeseven
assert lit_threeseven.__file__.startswith({str(tmp_path)!r})
from lit_threeseven.run.cli import main
main(["--trainer.max_epochs", "2"])
main(["test", "--ckpt_path", "pretrained"])
"""
    output = python(program, tmp_path)
    assert "2,038 to test" in output
    assert "98.33%" in output  # of the trained network that ships


@pytest.mark.slow
def test_console_command_is_the_train_script():
    script = [sys.executable, str(PROJECT / "scripts" / "train.py"), "--help"]
    command = [str(Path(sys.executable).with_name("lit-threeseven")), "--help"]
    programs = [subprocess.Popen(program, stdout=subprocess.PIPE, text=True) for program in (script, command)]
    expected, given = (program.communicate(timeout=120)[0] for program in programs)
    assert [program.returncode for program in programs] == [0, 0]
    assert given == expected.replace("train.py", "lit-threeseven")
