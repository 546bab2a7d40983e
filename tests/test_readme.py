"""The commands of the README and of docs/, as a reader pastes them: one bash for all blocks in the order of the pages,
one folder for all their commands.

Bash itself reads the blocks, with recorders in place of the programs they call. What it recorded is then run, on tiny
networks, a CelebA of eight images and an ImageNet of sixteen.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image
from torch.distributed.run import get_args_parser

import benchmark
import calibrate
import compare
import eesampler
import fid
import main
import pack
import sampler
import train
from common.config import build_config, read_yaml
from common.images import save_png
from models import autoencoder
from models.loading import build_network
from tests.folders import timesteps_told
from tests.latents import NARROW, public_names, tiny_imagenet

ROOT = Path(__file__).parents[1]
BASH = shutil.which("bash")
CPU = ["--device", "cpu"]
SAMPLING = ["--solver", "ddim", "--steps", "4", "--batch_size", "3", *CPU]
TRAINING = ["--batch_size", "2", "--num_warmup_steps", "1", "--preview_steps", "1", "--embed_dim", "32"]
TRAINING += ["--num_heads", "4", *CPU]
CALIBRATING = ["--n_images", "8", "--speedup", "1"]
# Of each script what makes it quick; options given twice count the last time.
SCRIPTS: dict[str, tuple[Callable, list[str]]] = {
    "train.py": (train.main, TRAINING),
    "main.py": (main.main, TRAINING),
    "sampler.py": (sampler.main, SAMPLING),
    "eesampler.py": (eesampler.main, SAMPLING),
    "fid.py": (fid.main, ["--feature_extractor", "extractor.pt", "--cache_dir", "cache", *CPU]),
    "compare.py": (compare.main, []),
    "calibrate.py": (calibrate.main, [*CALIBRATING, "--solver", "ddim", "--steps", "4", "--batch_size", "4", *CPU]),
    "pack.py": (pack.main, ["--num_workers", "0"]),
    # Tested elsewhere, on networks of their own: here their words are read.
    "benchmark.py": (benchmark.parse_settings, []),
}
RECORDER = """#!{bash}
printf '%s\\x1f' "${{0##*/}}" "$@" >> {calls}
printf '\\x1e' >> {calls}
{also}
"""
# Programs of the blocks, and what they do beside being recorded.
PROGRAMS = {
    **dict.fromkeys(("python", "bash", "pip", "pre-commit", "torchrun"), ""),
    "python3": "mkdir -p venv/bin && touch venv/bin/activate",  # -m venv venv
    "sbatch": 'SLURM_NNODES=2 SLURM_JOB_ID=7 exec {bash} -eu "$1"',
    "srun": '"$@"',
    "scontrol": 'if [ "$1" = show ]; then echo machine-0; fi',
}


def pages() -> dict[str, str]:
    """The texts of the README and of docs/, by their paths."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


class MeanColour(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(2, 3))


def tiny_celeba(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for n in range(1, 9):
            pixels = np.random.default_rng(n).integers(0, 256, (218, 178, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG")
            archive.writestr(f"img_align_celeba/{n:06d}.jpg", file.getvalue())


def public_weights(path: Path, described: str) -> None:
    """A tiny network in the public layout, in which no weight is 0. described: a file in configs/."""
    settings = {"model": "uvit"} | read_yaml(path.parents[1] / "configs" / described)
    if settings["model"] == "dit":
        settings["model_params"] |= {"learn_sigma": True}
    network = build_network(build_config(settings, described))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    torch.save(network.state_dict(), path)


def public_autoencoder(path: Path) -> None:
    """For the public file, a narrow one under its names; for a folder, one of diffusers."""
    network = AutoencoderKL(**NARROW)
    if path.suffix == ".pth":
        torch.save(public_names(network.state_dict()), path)
    else:
        network.save_pretrained(path)


# What a reader is told to put somewhere, and what stands for it here.
def own_images(folder: Path) -> None:
    """Two classes of small colour images."""
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for i in range(8):
            pixels = torch.randint(0, 256, (3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
            save_png(folder / name / f"{i}.png", pixels)


TO_PUT: dict[str, Callable[[Path], object]] = {
    "img_align_celeba.zip": tiny_celeba,
    "my_images/": own_images,
    "n01440764/": lambda first_class: tiny_imagenet(first_class.parent, 8, (80, 72)),
    **dict.fromkeys(("autoencoder_kl.pth", "autoencoder_kl_ema.pth"), public_autoencoder),
    **dict.fromkeys(("sd-vae-ft-mse/", "sd-vae-ft-ema/"), public_autoencoder),
    "celeba_uvit_small.pth": partial(public_weights, described="uvit_celeba_public.yaml"),
    **{
        f"{name}.pth": partial(public_weights, described=f"{config}_public.yaml")
        for name, config in (
            ("imagenet64_uvit_mid", "uvit_imagenet64_mid"),
            ("imagenet64_uvit_large", "uvit_imagenet64_large"),
            ("imagenet256_uvit_large", "uvit_imagenet256_large"),
            ("imagenet256_uvit_huge", "uvit_imagenet256_huge"),
        )
    },
    **{
        f"{name}.pt": partial(public_weights, described=f"{config}_public.yaml")
        for name, config in (
            ("DiT-L-2-256x256", "dit_imagenet256_l"),
            ("DiT-XL-2-256x256", "dit_imagenet256_xl"),
            ("SiT-S-2-256", "sit_imagenet256_s"),
            ("SiT-XL-2-256x256", "sit_imagenet256_xl"),
        )
    },
}
PUT = re.compile(r"[Pp]ut\s((?:`[^`]+`(?:,\s|\sand\s)?)+)[^`]*?into\s`([^`]+)`")


def tiny_configs(place: Path) -> None:
    """The files of configs/, of which those of CelebA and of public weights describe tiny networks."""
    for path in (ROOT / "configs").glob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        if "celeba" in path.stem or path.stem.endswith("_public"):
            config["model_params"] |= tiny(path.stem, config.get("model", "uvit"))
        (place / path.name).write_text(yaml.safe_dump(config, sort_keys=False))


def tiny(name: str, model: str) -> dict[str, int]:
    """Model parameters by which a network is small, and smaller than a larger one of its family."""
    params = {"hidden_size" if model == "dit" else "embed_dim": 32, "num_heads": 4}
    if "celeba" in name or "cifar10" in name:
        return params
    depths = {"_s_": 1, "_b_": 1, "_mid_": 1, "_l_": 2, "_large_": 3, "_xl_": 3, "_huge_": 5}
    params["depth"] = next(depth for size, depth in depths.items() if size in name)
    if "256" in name or "512" in name:  # of latents; of 64 x 64 pixels then
        params |= {"input_size": 8} if model == "dit" else {"img_size": 8}
    return params


class Call(NamedTuple):
    words: list[str]
    printed: str


def recorded(blocks: str, place: Path) -> list[list[str]]:
    """The commands that a bash calls which is given the blocks in `place`, where none of them does anything."""
    programs, calls = place / ".programs", place / ".calls"
    programs.mkdir()
    for name, also in PROGRAMS.items():
        content = RECORDER.format(bash=BASH, calls=calls, also=also.format(bash=BASH))
        (programs / name).write_text(content)
        (programs / name).chmod(0o755)
    done = subprocess.run(
        [BASH, "-euo", "pipefail", "-c", blocks],
        cwd=place,
        env={"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(place)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [call.split("\x1f")[:-1] for call in calls.read_text().split("\x1e")[:-1]]


def run(words: list[str]) -> None:
    """One of the commands, quickly. Raises SystemExit where it is refused."""
    program, *rest = words
    if program == "torchrun":
        launched = get_args_parser().parse_args(rest)
        rest = [launched.training_script, *launched.training_script_args]
    elif program == "bash":
        assert (ROOT / rest[0]).is_file(), f"{rest[0]} is not there"
    elif program == "pip":
        assert (ROOT / rest[-1]).is_file(), f"{rest[-1]} is not there"
    if program not in ("python", "torchrun") and rest[0] not in SCRIPTS:
        return
    script, *argv = rest[1:] if rest[0] == "-m" else rest
    call, quick = SCRIPTS[script]
    if "--n_samples" in argv:
        quick = [*quick, "--n_samples", "4"]
    if "auto" in argv:
        quick = [*quick, *CALIBRATING]
    if script in ("train.py", "main.py"):
        quick = [*quick, "--n_steps", "3" if "--load_checkpoint_path" in argv else "2"]
    if script == "pack.py" and "imagenet256" in argv:
        call = inspect.getmodule(pack.main).parse_settings  # of 1.3 million images
    call([*argv, *quick])


def files_in(place: Path) -> dict[Path, int]:
    """When each file was changed; hidden ones and the cache of scores aside."""
    paths = (path for path in place.rglob("*") if path.is_file() and not path.is_symlink())
    inside = ((path.relative_to(place), path) for path in paths)
    return {
        name: path.stat().st_mtime_ns
        for name, path in inside
        if name.parts[0] != "cache" and not any(part.startswith(".") for part in name.parts)
    }


def walked(names: Sequence[str], place: Path) -> Iterator[list[Call]]:
    """What the commands of these pages print, run in their order in a folder that becomes the working folder.

    It has the project's own files, in tiny, and what the text above the blocks says that a reader puts there.
    """
    if BASH is None:
        pytest.skip("the blocks are bash's")
    text = "\n".join(pages()[name] for name in names)
    (place / "configs").mkdir()
    tiny_configs(place / "configs")
    with torch.no_grad():
        traced = torch.jit.trace(MeanColour(), torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    traced.save(str(place / "extractor.pt"))
    for names, folder in PUT.findall(text):
        (place / folder).mkdir(parents=True, exist_ok=True)
        for name in re.findall("`([^`]+)`", names):
            TO_PUT[name](place / folder / name)

    calls = recorded("\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)), place)
    done: list[Call] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(autoencoder, "ARCHITECTURE", NARROW)
        for words in calls:
            there, printed = files_in(place), io.StringIO()
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                try:
                    run(words)
                except SystemExit:
                    pytest.fail(f"{words}: {printed.getvalue()}")
            now = files_in(place)
            changed = [str(name) for name, when in there.items() if now.get(name) != when]
            assert not changed, f"{words} changes what a command before it made: {changed}"
            done.append(Call(words, printed.getvalue()))
        yield done


# Pages whose commands use the files of those before them.
WALK = [
    "README.md",
    *(f"docs/{n}.md" for n in ("celeba", "training", "sampling", "choosing", "clusters", "data", "speed")),
]


@pytest.fixture(scope="module")
def walk(tmp_path_factory) -> Iterator[list[Call]]:
    yield from walked(WALK, tmp_path_factory.mktemp("readme"))


@pytest.fixture
def public_walk(tmp_path) -> Iterator[list[Call]]:
    yield from walked(["docs/public-weights.md"], tmp_path)


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def printed_by(walk: list[Call], *words: str) -> str:
    (printed,) = (call.printed for call in walk if set(words) <= set(call.words))
    return printed


def test_a_variable_that_no_block_sets_is_found(tmp_path):
    with pytest.raises(AssertionError, match="full_samples: unbound variable"):
        recorded('export samples=out\npython compare.py "a=${samples}" "full=${full_samples}"', tmp_path)


def test_every_page_with_commands_is_walked():
    with_commands = {page for page, text in pages().items() if "```bash" in text}
    # tests/evaluation reads the commands of comparing.md; what they compare, the demo makes.
    assert with_commands == {*WALK, "docs/public-weights.md", "docs/comparing.md"}


def test_links_lead_somewhere():
    """To files of the project, and to headings of pages."""
    texts = pages()
    headings = {
        name: {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in text.splitlines()}
        for name, text in texts.items()
    }
    found = 0
    for name, text in texts.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            if re.match(r"https?://|mailto:", target):
                continue
            path, _, heading = target.partition("#")
            place = (ROOT / name).parent / path if path else ROOT / name
            assert place.exists(), f"{name}: {target}"
            page = place.resolve().relative_to(ROOT).as_posix()
            assert not heading or heading in headings[page], f"{name}: {target}"
            found += 1
    assert found > 20


def test_the_readme_is_short():
    assert len(pages()["README.md"].splitlines()) <= 200


PAIRS = {"imagenet64": "imagenet64", "imagenet256": "imagenet256", "dit": "imagenet256", "sit": "imagenet256"}


@pytest.mark.slow
def test_pairs_of_public_networks_and_a_shallow_one_beside(public_walk):
    for name, dataset in PAIRS.items():
        folder = Path("out") / name
        said = printed_by(public_walk, "sampler.py", f"out/{name}/pair")
        assert timesteps_told(said) == {"shallow": 2, "full": 2}  # 999, 749; 499, 249
        said = printed_by(public_walk, "calibrate.py", f"out/{name}/switch.yaml")
        assert f"8 images of {dataset}" in said and "chosen: t_switch" in said
        measured = json.loads((folder / "switch.json").read_text())["networks"]
        assert all(distance > 0 for distance in measured[0]["distance"]["mean"])
        full, pair = (json.loads((folder / run / "report/statistics.json").read_text()) for run in ("full", "pair"))
        assert full["network_flops_per_image"] > pair["network_flops_per_image"]
        assert {Image.open(path).size for path in folder.glob("*/0*.png")} == {(64, 64)}
        rows = printed_by(public_walk, "compare.py", f"full=out/{name}/full").splitlines()[2:5]
        assert [row.split("  ")[0] for row in rows] == ["full", "switch at 499", "calibrated"]
        assert (folder / "comparison.png").exists()
    said = printed_by(public_walk, "sampler.py", "out/public_duodiff")
    assert timesteps_told(said) == {"shallow": 2, "full": 2}  # 999, 749; 499, 249
    carried = torch.load("logs/shallow_public/celeba_uvit_last.pth", weights_only=True)["config"]
    assert carried["crop"] == "uvit128" and carried["diffusion_params"]["beta_schedule"] == "continuous_vp"


@pytest.mark.slow
def test_every_script_has_its_place(walk):
    called = {word for call in walk for word in call.words}
    assert called >= set(SCRIPTS) | {"scripts/demo.sh", "scripts/test.sh"}


@pytest.mark.slow
def test_the_walk(walk):
    said = printed_by(walk, "sampler.py", "out/duodiff")
    assert timesteps_told(said) == {"shallow": 2, "full": 2}  # 999, 749; 499, 249
    rows = printed_by(walk, "compare.py", "full=out/full").splitlines()
    assert rows[0].endswith("speed-up") and [row.split("  ")[0] for row in rows[2:5]] == [
        "full",
        "DuoDiff",
        "early exit",
    ]
    for path in ("out/duodiff/000002.png", "out/full/report/metrics.json", "out/early_exit/report/exit_layer.png"):
        assert Path(path).exists(), path
    assert Path("comparison.png").exists()


@pytest.mark.slow
def test_a_queue_is_given_the_job_until_it_is_done(walk, tmp_path):
    """The job asks for itself again unless the last step is logged; bash reads it, and what it calls does nothing."""
    submitted = [call.words for call in walk if call.words[0] in ("sbatch", "srun", "scontrol")]
    assert [words[0] for words in submitted] == ["sbatch", "scontrol", "srun", "scontrol"]
    assert submitted[-1] == ["scontrol", "requeue", "7"] and "--resume" not in submitted[2]
    run_folder = tmp_path / "logs" / "celeba_slurm"
    run_folder.mkdir(parents=True)
    (run_folder / "celeba_uvit_last.pth").touch()
    for step, ends in ((50000, "requeue"), (500000, "train.py")):
        (run_folder / "metrics.jsonl").write_text(json.dumps({"step": step, "loss": 0.1}) + "\n")
        shutil.rmtree(tmp_path / ".programs", ignore_errors=True)
        (tmp_path / ".calls").unlink(missing_ok=True)
        shutil.copy("train.sbatch", tmp_path)
        calls = recorded("export log_path=logs\nsbatch train.sbatch || true", tmp_path)
        assert ends in calls[-1] and "--resume" in calls[2], calls


@pytest.mark.slow
def test_two_public_networks_without_training(walk):
    assert timesteps_told(printed_by(walk, "sampler.py", "out/public_pair")) == {"shallow": 2, "full": 2}


@pytest.mark.slow
def test_where_to_switch(walk):
    assert "chosen: t_switch" in printed_by(walk, "calibrate.py", "logs/calibration.yaml")
    assert "chosen: t_switch" in printed_by(walk, "sampler.py", "auto")
    assert Path("logs/calibration.yaml").exists() and Path("out/switch_auto/report/calibration.png").exists()


@pytest.mark.slow
def test_networks_for_their_part(walk):
    for name, expected in (("celeba_uvit_13", (0, 999)), ("full_499", (0, 499)), ("shallow_500", (500, 999))):
        config = torch.load(f"logs/{name}/celeba_uvit_last.pth", weights_only=True)["config"]
        assert (config["t_min"], config["t_max"]) == expected


@pytest.mark.slow
def test_the_best_plan(walk):
    assert "the whole plan on other paths" in printed_by(walk, "calibrate.py", "--plan")
    assert json.loads(Path("out/plan/report/statistics.json").read_text())["stages"]


@pytest.mark.slow
def test_cascades_and_saving(walk):
    said = printed_by(walk, "sampler.py", "cascade.yaml")
    assert timesteps_told(said) == {"network 1": 2, "network 2": 1, "network 3": 1}
    backbone = json.loads(Path("out/caching/report/statistics.json").read_text())["backbones"][0]
    assert backbone["timesteps_reusing"] == 2  # of 999, 749, 499, 249 the middle two
    said = printed_by(walk, "sampler.py", "out/corrected")
    assert timesteps_told(said) == {"shallow": 4, "full": 2}  # at 499 and 249 the full one corrects the shallow one


@pytest.mark.slow
def test_benchmarks(walk):
    """Of the networks that they take if none are named; tests/test_benchmark.py runs them on small ones."""
    parsed = [benchmark.parse_settings(call.words[2:]) for call in walk if "benchmark.py" in call.words]
    assert [command for command, _ in parsed] == ["sample", "early-exit", "train"]
    paths = [path for _, settings in parsed for path in vars(settings).values() if isinstance(path, Path)]
    paths = [path for path in paths if path.suffix == ".yaml"]
    assert paths and all((ROOT / path).is_file() for path in paths)


@pytest.mark.skipif(BASH is None, reason="the demo is bash's")
def test_what_the_demo_prints_can_be_pasted(tmp_path):
    """Labels and folders with spaces reach the scripts as they did in the demo."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    shutil.copy(ROOT / "requirements.txt", tmp_path / "venv" / ".requirements-installed")
    calls = tmp_path / "calls"
    python.write_text(RECORDER.format(bash=BASH, calls="calls", also=""))
    python.chmod(0o755)

    def called(*argv: str) -> tuple[str, bytes]:
        calls.unlink(missing_ok=True)
        done = subprocess.run([BASH, *argv], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout, calls.read_bytes()

    printed, by_the_demo = called("scripts/demo.sh", "a demo $1")
    pasted = [line.removeprefix("$ ") for line in printed.splitlines() if line.startswith("$ ")]
    assert len(pasted) == 25 and b"DuoDiff t_switch=300=a demo $1/samples_duo_300" in by_the_demo
    scripts = [call for call in by_the_demo.split(b"\x1e") if b"\x1f-c\x1f" not in call]  # -c: what is installed?
    assert called("-c", "\n".join(pasted))[1].split(b"\x1e") == scripts
    quick = [
        line for line in called("scripts/demo.sh", "--quick", "a demo $1")[0].splitlines() if line.startswith("$ ")
    ]
    assert quick == [f"$ {line}" for line in pasted[:11]] and "compare.py" in quick[10]
