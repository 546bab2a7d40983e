"""Networks of diffusers from the Hugging Face hub. Nothing else of this project asks the hub for anything."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common.errors import NO_ROOM, InputError, WriteError
from common.files import writable_folder
from models.diffusers_folder import read_folder

# What describes a network, and its weights as diffusers looks for them: no pickles, no code, no weights in other
# precisions.
DESCRIPTIONS = ("model_index.json", "config.json", "*/config.json", "scheduler_config.json", "*/scheduler_config.json")
WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model-*-of-*.safetensors",
)


def download(repo: str, folder: Path, *, quiet: bool = False) -> None:
    """Fetch a network, with its scheduler and autoencoder, into a folder; one that is there already stays as it is.

    repo: OWNER/NAME. The folder appears when all of it is there. Raises InputError for a repository that cannot be
    reached, or that has no such network in safetensors; descriptions are looked at before weights are fetched.
    """
    if folder.exists():
        return
    beside = writable_folder(folder.parent)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=beside) as temporary:
        described, whole = Path(temporary) / "described", Path(temporary) / "whole"
        _fetch(repo, described, DESCRIPTIONS, folder, quiet=True)
        part = _network_in(repo, described)
        weights = [(place / name).as_posix() for place in (part, Path("vae")) for name in WEIGHTS]
        # Into another folder, because the client of the hub considers a folder with files complete.
        _fetch(repo, whole, (*DESCRIPTIONS, *weights), folder, quiet=quiet)
        if not any((whole / part).glob("*.safetensors")):
            raise InputError(f"--download {repo}: has no weights in safetensors, and pickles are not downloaded")
        shutil.rmtree(whole / ".cache", ignore_errors=True)  # of the hub's client
        whole.rename(folder)


def _network_in(repo: str, folder: Path) -> Path:
    """The part of the repository that is the network, relative to it. Raises InputError for an unsupported one."""
    try:
        return read_folder(folder).network.relative_to(folder)
    except InputError as error:
        reason = str(error).replace(str(folder), repo)
        raise InputError(f"--download {repo}: it has no supported network ({reason})") from None


def _fetch(repo: str, into: Path, patterns: Sequence[str], wanted: Path, *, quiet: bool) -> None:
    """Fetch the files of a repository that match. wanted: the folder to name if the disk is full."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    into.mkdir()
    shown = not are_progress_bars_disabled()
    if quiet and shown:
        disable_progress_bars()
    try:
        snapshot_download(repo, local_dir=into, allow_patterns=list(patterns))
    except HFValidationError:
        raise InputError(f"--download {repo}: not the name of a repository; wanted OWNER/NAME") from None
    except RepositoryNotFoundError:
        raise InputError(f"--download {repo}: no such repository on the hub, or it is not public") from None
    except Exception as error:  # without a connection the client raises any error
        if isinstance(error, OSError) and error.errno is not None and error.errno in NO_ROOM:
            raise WriteError(wanted, error.errno) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--download {repo}: the download failed ({reason:.120}); is this machine online?") from None
    finally:
        if quiet and shown:
            enable_progress_bars()
