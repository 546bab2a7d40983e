"""Decode a dataset once into one array, which training reads at disk speed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import Parser
from common.errors import command
from data import crop_of, open_dataset
from data.packing.settings import PackSettings

if TYPE_CHECKING:
    from data.dataset import ImageDataset


def parse_settings(argv: Sequence[str] | PackSettings | None) -> PackSettings:
    return Parser(description=__doc__).settings(PackSettings, argv, network=False)


@command
def main(argv: Sequence[str] | PackSettings | None = None) -> None:
    settings = parse_settings(argv)
    if settings.benchmark:
        from benchmarking.packing import run

        return run(settings.output, max(1, settings.num_workers))
    assert settings.dataset is not None, "PackSettings requires it"
    crop = crop_of(settings.dataset, settings.crop)
    shape: dict[str, Any] = {"img_size": settings.img_size, "in_chans": settings.in_chans, "crop": crop}
    dataset = open_dataset(
        settings.dataset,
        settings.data_path,
        **shape,
        num_classes=settings.num_classes,
        download=settings.download,
        packed=False,
    )

    from data.dataset import some_of
    from data.packing.packed import IMAGES, MANIFEST, default_folder
    from data.packing.work import in_bytes, pack

    if checkpoint := settings.autoencoder_checkpoint_path:
        dataset = encoded(dataset, checkpoint, settings)
        shape |= {name: dataset.describe()[name] for name in ("img_size", "in_chans")}
    output = settings.output or default_folder(settings.dataset, settings.data_path, **shape)
    manifest = pack(dataset, output, settings.num_workers, settings.machine.quiet)
    print(f"{manifest.shape[0]:,} images -> {output} ({in_bytes((output / IMAGES).stat().st_size)})")
    if manifest.left_out:
        print(f"{some_of(manifest.left_out)}; the full list is in {output / MANIFEST}")


def encoded(images: ImageDataset, checkpoint: Path, settings: PackSettings) -> ImageDataset:
    """The images as latents of the autoencoder in that checkpoint."""
    from common.devices import pick_device
    from data.packing.latents import LatentSource
    from models.autoencoder import load_autoencoder

    device = pick_device(settings.machine.device)
    autoencoder = load_autoencoder(checkpoint, settings.scale_factor, device)
    return LatentSource(images, autoencoder, checkpoint, device)


if __name__ == "__main__":
    main()
