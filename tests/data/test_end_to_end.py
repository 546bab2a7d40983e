"""Every dataset in its true format, all the way: packed or not, train two steps, sample, score."""

from __future__ import annotations

import gzip
import io
import json
import zipfile

import numpy as np
import pytest
import torch

import fid
import pack
import sampler
import train as train_script
from data import open_dataset


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    class MeanColour(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().mean(dim=(2, 3))

    path = tmp_path_factory.mktemp("extractor") / "mean_colour.pt"
    torch.jit.trace(MeanColour(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).save(str(path))
    return path


def make_celeba(root, request):
    picture = request.getfixturevalue("picture_of")
    with zipfile.ZipFile(root / "img_align_celeba.zip", "w") as archive:
        for n in range(1, 7):
            file = io.BytesIO()
            picture((178, 218), n).save(file, "JPEG")
            archive.writestr(f"img_align_celeba/{n:06d}.jpg", file.getvalue())


def make_cifar10(root, request):
    request.getfixturevalue("make_cifar10_archive")(root / "cifar-10-python.tar.gz")


def make_imagenet64(root, request):
    (root / "imagenet64").mkdir()
    for number in range(1, 11):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 3 * 64 * 64), dtype=np.uint8)
        np.savez(root / "imagenet64" / f"train_data_batch_{number}.npz", data=pixels, labels=[1, 5, 999, 1000])


def make_imagenet256(root, request):
    picture = request.getfixturevalue("picture_of")
    for synset in ("n01440764", "n15075141"):
        (root / "imagenet" / synset).mkdir(parents=True)
        for n in range(3):
            picture((300, 270), n).save(root / "imagenet" / synset / f"{n}.JPEG")


def make_fashion_mnist(root, request):
    (root / "fashion-mnist").mkdir()
    for name, content in request.getfixturevalue("idx_files").items():
        (root / "fashion-mnist" / f"{name}.gz").write_bytes(gzip.compress(content))


SETS = {
    "celeba": (make_celeba, 64, 3, -1),
    "cifar10": (make_cifar10, 32, 3, 11),
    "fashion_mnist": (make_fashion_mnist, 28, 1, 11),
    "imagenet64": (make_imagenet64, 64, 3, 1001),
    "imagenet256": (make_imagenet256, 256, 3, 1000),
}


@pytest.mark.parametrize("packed", [False, True], ids=["as it is", "packed"])
@pytest.mark.parametrize("name", SETS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_all_the_way(name, packed, tmp_path, request, extractor, capsys):
    make, size, in_chans, num_classes = SETS[name]
    (tmp_path / "datasets").mkdir()
    make(tmp_path / "datasets", request)
    where = ["--dataset", name, "--data_path", str(tmp_path / "datasets")]
    wanted = {"img_size": size, "in_chans": in_chans, "num_classes": num_classes}
    as_it_is = open_dataset(name, tmp_path / "datasets", **wanted, packed=False)
    if packed:
        pack.main([*where, "--img_size", str(size), "--in_chans", str(in_chans), "--quiet", "--num_workers", "0"])
        taken = open_dataset(name, tmp_path / "datasets", **wanted)
        assert type(taken).__name__ == "PackedDataset"
        for got, want in zip(taken.__getitems__([3, 0]), as_it_is.__getitems__([3, 0]), strict=True):
            assert torch.equal(got, want)

    network = ["--img_size", size, "--patch_size", size // 4, "--embed_dim", 32, "--num_heads", 4, "--depth", 1]
    flags = [
        "--in_chans",
        in_chans,
        "--num_classes",
        num_classes,
        "--n_steps",
        2,
        "--batch_size",
        4,
        "--num_timesteps",
        8,
        "--quiet",
    ]
    flags += ["--log_path", tmp_path, "--preview_steps", 1, "--n_samples", 1, "--device", "cpu", "--num_workers", 0]
    train_script.main([str(arg) for arg in [*where, *network, *flags]])

    checkpoint, samples = tmp_path / f"{name}_uvit_1" / f"{name}_uvit_last.pth", tmp_path / "samples"
    argv = ["--checkpoint_path", checkpoint, "--output_folder", samples, "--n_samples", 3, "--quiet", "--device", "cpu"]
    if name in ("cifar10", "fashion_mnist", "imagenet64"):
        argv += ["--guidance_scale", 0.5]
    sampler.main([str(arg) for arg in argv])

    argv = ["--samples_path", samples, "--feature_extractor", extractor, "--cache_dir", tmp_path / "cache", "--quiet"]
    fid.main([str(arg) for arg in [*argv, *where, "--device", "cpu"]])
    about = json.loads((samples / "report" / "metrics.json").read_text())
    assert about["fid"] > 0 and about["reference"]["n_reference"] == len(as_it_is)
    assert about["reference"]["crop"] == as_it_is.describe()["crop"]
