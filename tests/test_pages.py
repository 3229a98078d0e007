"""The pages: every command and every block of Python is run as it stands."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "lit_threeseven/README.md",
    "lit_threeseven/use/README.md",
    "scripts/README.md",
    "tests/README.md",
]

# Commands that other tests run, or .ci/run does.
ELSEWHERE = {
    "python3 -m venv": ".ci/run",
    "python scripts/benchmark.py --quick": ".ci/run",
    "python scripts/pretrained.py --check": "test_recognize.py",
    "python scripts/article_starts.py": "test_scripts.py",  # with fewer starts
    "python scripts/tour.py": "test_scripts.py",
    "torchrun": "test_devices.py",
    "lit-threeseven --trainer.devices 2": "test_devices.py",
    "lit-threeseven verify": "test_package.py",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun": "test_elastic.py",
    "srun": "test_launch.py",
    "tensorboard": "test_watch.py",
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def commands(page: str) -> list[str]:
    text = "".join(blocks(page, "bash")).replace("\\\n", " ")
    lines = [re.sub(r"(^|\s+)#.*", "", line).strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith(tuple(ELSEWHERE))]


@pytest.fixture
def checkout(cli, script):
    """Runs a command in a folder with the repository's files in it."""
    for name in ("scripts", "lit_threeseven", ".readme"):
        (cli.folder / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def run(command: str) -> None:
        program, *args = shlex.split(command)
        if program == "lit-threeseven" and ">" not in args:  # here, without the time that a process takes to start
            code, _, error = cli(*args)
            assert code == 0, error
        elif program == "python" and args[0].startswith("scripts/"):
            code, output = script(args[0].removeprefix("scripts/"), *args[1:])
            assert code == 0, output
        else:
            options = {"env": os.environ | {"PATH": path}, "capture_output": True, "text": True, "timeout": 900}
            result = subprocess.run(["bash", "-euo", "pipefail", "-c", command], check=False, **options)
            assert result.returncode == 0, result.stdout + result.stderr

    return run


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_every_command_of_a_page_runs(page, checkout):
    if page == "scripts/README.md":  # which draws the weights of a run
        checkout("lit-threeseven fit --run version_0 --trainer.max_epochs 20")
    for command in commands(page):
        checkout(command)


def test_the_first_page_can_be_read_in_five_minutes():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    assert len(text.split()) < 1200


def test_the_picture_on_the_first_page_is_answered_as_it_says(cli):
    _, table = blocks("README.md", "text")
    code, output, _ = cli("recognize", ROOT / ".readme" / "three.png")
    assert code == 0
    assert [line.split()[:2] for line in output.splitlines()] == [line.split()[:2] for line in table.splitlines()]


@pytest.mark.parametrize("page", [*PAGES, "scripts/examples/README.md", ".github/CONTRIBUTING.md"])
def test_links_between_pages_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for link in [*re.findall(r"\]\((?!https?:)(.*?)\)", text), *re.findall(r'src="(.*?)"', text)]:
        file, _, heading = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        if heading:
            titles = re.findall("^#+ (.*)", target.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], link
