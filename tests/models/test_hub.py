"""Networks from the hub, of which a folder stands for a repository."""

from __future__ import annotations

import errno
import fnmatch
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

import sampler
from common.errors import InputError, WriteError
from models.hub import download
from tests.folders import samples

UNET = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8,), "norm_num_groups": 4}
UNET |= {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "layers_per_block": 1}


@pytest.fixture
def repository(tmp_path) -> Path:
    """A pipeline, with what must not be fetched beside it."""
    folder = tmp_path / "repository"
    scheduler = DDPMScheduler(num_train_timesteps=20, clip_sample=False)
    DDPMPipeline(UNet2DModel(**UNET), scheduler).save_pretrained(folder)
    for name in ("pipeline.py", "model.ckpt", "whole.safetensors", "unet/diffusion_pytorch_model.bin", "README.md"):
        (folder / name).write_bytes(b"unwanted")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"unwanted")
    return folder


@pytest.fixture
def hub(repository, monkeypatch):
    """Asked for OWNER/NAME, it gives the repository. Returns what it was asked for."""

    def snapshot(repo, *, local_dir, allow_patterns):
        asked.append(repo)
        for path in sorted(repository.rglob("*")):
            name = path.relative_to(repository).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, local_dir / name)
        (local_dir / ".cache" / "huggingface").mkdir(parents=True)

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return asked


@pytest.fixture
def broken(hub, monkeypatch):
    """Make the hub fail at the n-th call."""

    def fail(error: BaseException, at: int = 1):
        def snapshot(*args, **kwargs):
            if len(hub) + 1 == at:
                raise error
            return working(*args, **kwargs)

        working = huggingface_hub.snapshot_download
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)

    return fail


def test_descriptions_and_safetensors_alone(hub, tmp_path):
    download("owner/name", tmp_path / "new" / "net")
    there = {path.relative_to(tmp_path / "new").as_posix() for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert there == {
        "net/model_index.json",
        "net/scheduler/scheduler_config.json",
        "net/unet/config.json",
        "net/unet/diffusion_pytorch_model.safetensors",
    }
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "net"]


def test_a_folder_that_is_there_is_not_fetched(hub, tmp_path):
    download("owner/name", tmp_path)
    assert hub == []


def test_by_command(hub, full, tmp_path, run_quietly, fails):
    """The second time the folder is there; without the flag nothing asks the hub."""
    flags = ["--n_samples", 2, "--device", "cpu", "--quiet", "--output_folder"]
    pair = ["--checkpoint_path", full, "--checkpoint_path_late", tmp_path / "net", "--t_switch", 9]
    fails(sampler.main, [*pair, *flags, tmp_path / "s"], f"--checkpoint_path_late {tmp_path / 'net'}: no such file")
    for name in ("s", "again"):
        run_quietly(sampler.main, [*pair, "--download_late", "owner/name", *flags, tmp_path / name])
        assert len(samples(tmp_path / name)) == 2 and set(hub) == {"owner/name"} and len(hub) == 2
    alone = ["--checkpoint_path", tmp_path / "other", "--download", "owner/other"]
    run_quietly(sampler.main, [*alone, *flags, tmp_path / "alone"])
    assert hub[2:] == 2 * ["owner/other"]


@pytest.mark.parametrize(
    ("error", "at", "words"),
    [
        (LocalEntryNotFoundError("cannot locate\nmore"), 1, "owner/name: the download failed (cannot locate)"),
        (RepositoryNotFoundError.__new__(RepositoryNotFoundError), 1, "owner/name: no such repository on the hub"),
        (ConnectionError(), 2, "owner/name: the download failed (ConnectionError); is this machine online?"),
        (HFValidationError("bad"), 1, "owner/name: not the name of a repository; wanted OWNER/NAME"),
    ],
)
def test_what_cannot_be_fetched_leaves_nothing(broken, error, at, words, tmp_path, fails):
    broken(error, at)
    argv = ["--checkpoint_path", tmp_path / "new" / "net", "--download", "owner/name", "--device", "cpu"]
    fails(sampler.main, [*argv, "--output_folder", tmp_path / "s"], words)
    assert not list((tmp_path / "new").iterdir()) and not (tmp_path / "s").exists()


def test_a_stop_leaves_nothing(broken, tmp_path):
    broken(KeyboardInterrupt(), at=2)
    with pytest.raises(KeyboardInterrupt):
        download("owner/name", tmp_path / "new" / "net")
    assert not list((tmp_path / "new").iterdir())


def test_a_full_disk(broken, tmp_path):
    broken(OSError(errno.ENOSPC, "no room"), at=2)
    with pytest.raises(WriteError, match="net: could not be written"):
        download("owner/name", tmp_path / "net")


def test_another_network_is_refused_before_its_weights(hub, repository, tmp_path):
    (repository / "unet" / "config.json").write_text('{"_class_name": "UNet2DModel", "sample_size": "big"}')
    with pytest.raises(InputError, match=r"it has no supported network \(owner/name/unet/config.json: .*sample_size"):
        download("owner/name", tmp_path / "net")
    assert len(hub) == 1


def test_pickles_alone(hub, repository, tmp_path):
    (repository / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights in safetensors, and pickles are not downloaded"):
        download("owner/name", tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_flags_that_need_others(full, tmp_path, fails):
    flags = ["--output_folder", tmp_path / "s"]
    fails(sampler.main, ["--checkpoint_path", full, "--download_late", "a/b", *flags], "--checkpoint_path_late")
    fails(sampler.main, ["--download", "a/b", *flags], "--checkpoint_path")
    fails(sampler.main, ["--stages", full, "--download", "a/b", *flags], "--download", "--stages")
