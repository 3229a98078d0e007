"""Full disks: a run ends with a sentence, and what it saved before is intact."""

import errno
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from processes import TORCHRUN, TRAIN, Job, contents, last, said

from lit_threeseven.run import options

PROJECT = Path(__file__).parents[1]


def in_a_small_folder(tmp_path: Path, script: str) -> subprocess.CompletedProcess:
    """Run a shell script where the folder `small` is a 1 MB disk, and copy what is left on it to `kept`."""
    (tmp_path / "small").mkdir()
    script = textwrap.dedent(f"""
        mount -t tmpfs -o size=1m none small
        {script}
        code=$?
        mount -o remount,size=4m,rw small
        cp -r small kept
        exit $code
    """)
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    return subprocess.run(
        ["unshare", "--mount", *user, "sh", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("log_every_n_steps", [1, 10**6])  # what fails first: the curves, or the checkpoint
def test_a_disk_that_fills_in_mid_run_ends_it_with_a_sentence(tmp_path, log_every_n_steps):
    command = (
        f"{sys.executable} {TRAIN} fit --trainer.default_root_dir small --trainer.max_epochs 100000 "
        f"--trainer.check_val_every_n_epoch 100 --trainer.log_every_n_steps {log_every_n_steps}"
    )
    result = in_a_small_folder(
        tmp_path,
        f"""
        {command} & job=$!
        until test -e small/logs/version_0/checkpoints/last.ckpt || ! kill -0 $job; do sleep 0.02; done
        dd if=/dev/zero of=small/filler bs=1k 2>/dev/null
        wait $job
        """,
    )
    assert result.returncode == 1
    told = r"(lit-threeseven: warning: TensorBoardLogger stopped logging; .*No space left on device.*\n)?"
    told += r"lit-threeseven: error: .*No space left on device.* intact.*\n"
    assert re.fullmatch(told, said(result.stderr)), result.stderr
    assert result.stdout == ""
    for name in ("last", "best"):
        checkpoint = tmp_path / f"kept/logs/version_0/checkpoints/{name}.ckpt"
        assert torch.load(checkpoint, weights_only=True)["global_step"] >= 100
    folder = tmp_path / "kept"
    steps = torch.load(last(folder, "version_0"), weights_only=True)["global_step"]
    Job(folder, "fit", "--trainer.max_epochs", str(steps + 5), "--ckpt_path", "last").run()
    assert torch.load(last(folder, "version_0"), weights_only=True)["global_step"] == steps + 5


@pytest.mark.slow
def test_a_disk_that_fills_under_torchrun_ends_with_one_sentence_of_all_processes(tmp_path):
    torchrun = " ".join([*TORCHRUN, "--standalone", "--redirects", "3", "--log-dir", "printed"])
    in_a_small_folder(
        tmp_path,
        f"""
        {torchrun} -- {TRAIN} fit --trainer.accelerator cpu --trainer.default_root_dir small \
            --trainer.max_epochs 100000 --trainer.check_val_every_n_epoch 100 \
            --trainer.log_every_n_steps 1 & job=$!
        until test -e small/logs/version_0/checkpoints/last.ckpt || ! kill -0 $job; do sleep 0.02; done
        dd if=/dev/zero of=small/filler bs=1k 2>/dev/null
        wait $job
        """,
    )
    printed = "".join(path.read_text() for path in (tmp_path / "printed").rglob("*.log"))
    told = r"(lit-threeseven: warning: TensorBoardLogger stopped logging; .*No space left on device.*\n)?"
    assert re.fullmatch(told + r"lit-threeseven: error: .*No space left on device.* intact.*\n", said(printed)), printed


@pytest.mark.slow
def test_a_package_that_can_t_be_written_to_and_no_home_folder_are_enough(tmp_path):
    package = Path(options.__file__).parents[1]
    result = in_a_small_folder(
        tmp_path,
        f"""
        mount --bind {package} {package}
        mount -o remount,bind,ro {package}
        export HOME=/proc/nowhere LIT="{sys.executable} -m lit_threeseven"
        $LIT --trainer.max_epochs 3 && $LIT recognize {PROJECT}/.readme/three.png --explain why &&
        $LIT export pretrained --to html && ! touch {package}/x 2>/dev/null
        """,
    )
    assert (result.returncode, said(result.stderr)) == (0, "")
    assert "99.99%" in result.stdout
    assert (tmp_path / "LitThreeSeven.html").exists()


def test_a_checkpoint_that_can_t_be_written_leaves_the_one_before(cli, monkeypatch):
    cli("fit", "--run", "r", "--trainer.max_epochs", "3")
    before = contents(cli.folder)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code, _, error = cli("fit", "--run", "r", "--trainer.max_epochs", "6")
    assert code == 1
    assert re.search(r"\.ckpt can't be used \(No space left on device\).*Everything saved before is intact", error)
    assert contents(cli.folder) == before


def test_a_file_whose_name_the_system_gives_in_bytes_is_named_in_text():
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/größe".encode())
    assert options.sentence(error, ["fit"], 1).startswith("/full/größe can't be used (No space left on device)")
