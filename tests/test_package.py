import ast
import re
import shlex
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from torchvision.datasets import MNIST

from lit_threeseven.dataset import BUNDLED_ROOT

PROJECT = Path(__file__).parents[1]

# A user's program; mypy and Python both say of which type each value is.
TYPED = """
import lightning as L
from PIL import Image
from typing_extensions import reveal_type

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule
from lit_threeseven.functional import linear, sigmoid
from lit_threeseven.networks import LitThreeSevenMLP
from lit_threeseven.use import normalize

model = LitThreeSeven(lr=0.5)
data = ThreeSevenDataModule(batch_size=64, val_fraction=0.1)
trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False)
trainer.fit(model, data)
trainer.save_checkpoint("mine.ckpt")
image = normalize(Image.open("three.png"))
x = image.flatten()
reveal_type(image)  # Tensor
reveal_type(sigmoid(linear(x.unsqueeze(0), model.W, model.b)))  # Tensor
reveal_type(model(image.unsqueeze(0)))  # Tensor
reveal_type(model.W)  # Parameter
reveal_type(model.lr)  # float
reveal_type(data.train)  # TensorDataset
reveal_type(LitThreeSevenMLP(hidden_sizes=[8]))  # LitThreeSevenMLP
reveal_type(LitThreeSeven.from_pretrained())  # LitThreeSeven
reveal_type(LitThreeSevenMLP.from_pretrained())  # LitThreeSevenMLP
reveal_type(LitThreeSeven.load_from_checkpoint("mine.ckpt"))  # LitThreeSeven
reveal_type(ThreeSevenDataModule.load_from_checkpoint("mine.ckpt"))  # ThreeSevenDataModule
"""


def execute(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and with the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("built")
    execute(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, PROJECT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new environment that holds the wheel alone; everything else comes from this environment.

    It sees the folders of this environment without their .pth files, and so without an editable install.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder)
    programs = folder / "bin"
    (wheel,) = built.glob("*.whl")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        programs / "python",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    execute(*pip, wheel, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "others.pth").write_text("\n".join(others))
    found = execute(programs / "python", "-c", "import lit_threeseven; print(lit_threeseven.__file__)", cwd=folder)
    assert Path(found.stdout.strip()) == site / "lit_threeseven" / "__init__.py"
    return programs


@pytest.fixture
def shell(installed: Path, tmp_path: Path):
    """Run a command line of the new environment, in a folder with nothing but the picture three.png."""
    next(image for image, digit in MNIST(BUNDLED_ROOT, train=False) if digit == 3).save(tmp_path / "three.png")

    def run(line: str) -> str:
        program, *args = shlex.split(line)
        result = execute(installed / program, *args, cwd=tmp_path)
        return result.stdout + result.stderr

    run.folder = tmp_path
    return run


def test_importing_the_package_imports_nothing_but_torch_and_what_lightning_does(tmp_path):
    program = """
import sys, lightning.pytorch, torchvision.datasets
before = set(sys.modules)
from lit_threeseven import LitThreeSeven, ThreeSevenDataModule
print(*sorted(name for name in set(sys.modules) - before if name.split(".")[0] not in ("lit_threeseven", "torch")))
"""
    assert execute(sys.executable, "-c", program, cwd=tmp_path).stdout.split() == []


@pytest.mark.slow
def test_wheel_and_sdist_pass_the_strict_check_of_an_index(built):
    output = execute(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir(), cwd=built).stdout
    assert output.count("PASSED") == 2


@pytest.mark.slow
def test_wheel_says_what_it_is_and_holds_licences_data_networks_and_recipes(built):
    (wheel,) = built.glob("*.whl")
    assert wheel.stat().st_size < 4_500_000
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    assert {name.split("/")[0].split("-")[0] for name in files} == {"lit_threeseven"}
    (information,) = {name.split("/")[0] for name in files if ".dist-info/" in name}
    about = Parser().parsestr(files[f"{information}/METADATA"].decode())
    assert about["License-Expression"] == "Apache-2.0 AND CC-BY-SA-3.0"
    assert {f"Programming Language :: Python :: 3.{n}" for n in range(10, 15)} <= set(about.get_all("Classifier"))
    assert [line for line in about if line in ("Project-URL", "Home-page", "License")] == []
    for name in ("LICENSE", "bundled/README.md"):
        assert files[f"lit_threeseven/{name}"] == files[f"{information}/licenses/lit_threeseven/{name}"]
    assert b"Apache License\n                           Version 2.0" in files["lit_threeseven/LICENSE"]
    attribution = files["lit_threeseven/bundled/README.md"].decode()
    assert all(word in attribution for word in ("Yann LeCun", "creativecommons.org/licenses/by-sa/3.0", "excerpt"))
    held = {name.removeprefix("lit_threeseven/") for name in files}
    assert {f"bundled/{path.relative_to(BUNDLED_ROOT)}" for path in BUNDLED_ROOT.rglob("*-ubyte")} <= held
    assert {"py.typed", "use/page.html", "pretrained/LitThreeSeven.ckpt", "pretrained/LitThreeSevenMLP.ckpt"} <= held
    assert {f"recipes/{name}.yaml" for name in ("article", "deep", "fast")} <= held


@pytest.mark.slow
def test_sdist_holds_tests_scripts_and_the_pictures_of_its_pages(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert {"tests/test_package.py", "scripts/train.py"} <= files
    pages = [path for path in files if path.endswith("README.md")]
    assert {"README.md", "scripts/README.md", "tests/README.md"} <= set(pages)
    pictures = {
        (PROJECT / page).parent / path
        for page in pages
        for path in re.findall(r'src="([^"]+)"', (PROJECT / page).read_text())
    }
    assert pictures
    assert {str(path.resolve().relative_to(PROJECT)) for path in pictures} <= files


@pytest.mark.slow
def test_version_stands_in_one_place(shell):
    version = re.search(r'^version = "(.+)"$', (PROJECT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert shell("python -c 'import lit_threeseven; print(lit_threeseven.__version__)'").strip() == version
    sources = [*(PROJECT / "lit_threeseven").rglob("*.py"), *(PROJECT / "scripts").rglob("*.py")]
    assert [path for path in sources if f'"{version}"' in path.read_text()] == []


@pytest.mark.slow
def test_wheel_alone_trains_and_resumes(shell):
    assert "2,038 to test" in shell("lit-threeseven --config fast --trainer.max_epochs 2 --run r")
    assert "2 epochs after the first 2" in shell("lit-threeseven --config fast --trainer.max_epochs 4 --run r")
    assert [path.name for path in (shell.folder / "logs").iterdir()] == ["r"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lit-threeseven test --ckpt_path pretrained", "98.33%"),
        ("lit-threeseven recognize three.png", "\n    3 "),
        ("lit-threeseven sweep --lr 0.1,1 --epochs 5", "2 networks, 0 of them diverged"),
        ("lit-threeseven export pretrained --to html", "2,038 test images are the network's, within"),
    ],
)
def test_wheel_alone_runs_each_command(shell, line, expected):
    assert expected in shell(line)


@pytest.mark.slow
def test_wheel_alone_finds_the_published_bits_on_one_device_and_on_two(shell):
    output = shell("lit-threeseven verify --devices 1,2 --accelerator cpu")
    assert len(re.findall(r" [12] devices? +\d+  [0-9a-f]{64}  as published\n", output)) == 4
    assert "All bits are the published ones." in output


@pytest.mark.slow
def test_a_users_typed_program_sees_the_types_that_it_meets(shell):
    (shell.folder / "program.py").write_text(TYPED)
    expected = re.findall(r"# (\w+)$", TYPED, re.MULTILINE)
    settings = f"--config-file {PROJECT / 'pyproject.toml'} --cache-dir {PROJECT / '.mypy_cache'}"  # strict, and fast
    output = shell(f"python -m mypy {settings} program.py")
    assert re.findall(r'Revealed type is "[\w.]*?(\w+)"', output) == expected
    assert re.findall(r"Runtime type is '(\w+)'", shell("python program.py")) == expected


@pytest.mark.slow
def test_console_command_is_the_train_script(shell):
    assert shell("lit-threeseven --help") == shell(f"python {PROJECT / 'scripts' / 'train.py'} --help")


# The floors of the package, from the lowest to the highest; a file imports from its own floor or a lower one.
FLOORS = [
    [
        "errors",
        "whole",
        "functional",
        "augment",
        "dataset",
        "download",
        "weights",
        "sharing",
        "recipes",
        "runs",
        "signals",
    ],
    ["batches", "resumable", "metrics", "datamodule", "module"],
    ["networks", "checkpoints", "processes"],
    ["watch"],
    ["use"],
    ["run"],
    ["commands"],
    ["__main__"],
]


def floor(name: str) -> int:
    return next((i for i, rooms in enumerate(FLOORS) if name in rooms), -1)  # -1 for the package itself


def test_no_import_points_up():
    package = PROJECT / "lit_threeseven"
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lit_threeseven"):
                _, *rest = str(node.module).split(".")
                for room in rest[:1] or [alias.name for alias in node.names]:
                    if parts != ("__init__",):
                        assert floor(room) <= floor(parts[0]), f"{path} imports {room}"
    assert all(floor(path.stem) >= 0 for path in package.iterdir() if path.suffix == ".py" and path.stem != "__init__")
