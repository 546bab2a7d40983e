"""The README's commands, as a reader pastes them: one bash for all blocks in their order, one folder for all commands.

Bash itself reads the blocks, with recorders in place of the programs they call. What it recorded is then run, on tiny
networks and a CelebA of eight images.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
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
from experiments import results
from models.loading import build_network
from tests.folders import timesteps_told

ROOT = Path(__file__).parents[1]
BASH = shutil.which("bash")
CPU = ["--device", "cpu", "--quiet"]
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
    "scripts/results.sh": (results.parse_settings, []),
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


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


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


def public_weights(path: Path) -> None:
    """A tiny network in the public layout."""
    settings = read_yaml(path.parents[1] / "configs" / "uvit_celeba_public.yaml") | {"model": "uvit"}
    torch.save(build_network(build_config(settings, "public")).state_dict(), path)


# What a reader is told to put somewhere, and what stands for it here.
TO_PUT = {
    "img_align_celeba.zip": tiny_celeba,
    "celeba_uvit_small.pth": public_weights,
    "autoencoder_kl.pth": Path.touch,
}


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
    if "auto" in argv:
        quick = [*quick, *CALIBRATING]
    if script in ("train.py", "main.py"):
        quick = [*quick, "--n_steps", "3" if "--load_checkpoint_path" in argv else "2"]
    if "imagenet256" in argv:
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


@pytest.fixture(scope="module")
def walk(tmp_path_factory) -> Iterator[list[Call]]:
    """What the commands of the README print, run in their order in a folder that becomes the working folder.

    It has the project's own files, in tiny, and what the text above the blocks says that a reader puts there.
    """
    if BASH is None:
        pytest.skip("the blocks are bash's")
    place = tmp_path_factory.mktemp("readme")
    (place / "configs").mkdir()
    for path in (ROOT / "configs").glob("*celeba*.yaml"):
        config = yaml.safe_load(path.read_text())
        config["model_params"] |= {"embed_dim": 32, "num_heads": 4}
        (place / "configs" / path.name).write_text(yaml.safe_dump(config))
    for path in (ROOT / "configs").glob("*.yaml"):
        if not (place / "configs" / path.name).exists():
            shutil.copy(path, place / "configs")
    with torch.no_grad():
        traced = torch.jit.trace(MeanColour(), torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    traced.save(str(place / "extractor.pt"))
    for name, folder in re.findall(r"[Pp]ut\s`([^`]+)`[^`]*?into\s`([^`]+)`", readme()):
        (place / folder).mkdir(exist_ok=True)
        TO_PUT[name](place / folder / name)

    calls = recorded("\n".join(re.findall(r"```bash\n(.*?)```", readme(), re.DOTALL)), place)
    done: list[Call] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
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


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def printed_by(walk: list[Call], *words: str) -> str:
    (printed,) = (call.printed for call in walk if set(words) <= set(call.words))
    return printed


def test_a_variable_that_no_block_sets_is_found(tmp_path):
    with pytest.raises(AssertionError, match="full_samples: unbound variable"):
        recorded('export samples=out\npython compare.py "a=${samples}" "full=${full_samples}"', tmp_path)


@pytest.mark.slow
def test_every_script_has_its_place(walk):
    called = {word for call in walk for word in call.words}
    assert called >= set(SCRIPTS) | {"scripts/demo.sh", "scripts/test.sh"}


@pytest.mark.slow
def test_the_walk(walk):
    said = printed_by(walk, "sampler.py", "out/duodiff")
    assert timesteps_told(said) == {"shallow": 3, "full": 1}  # 999, 749, 499; 249
    rows = printed_by(walk, "compare.py").splitlines()
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
def test_from_the_public_weights_to_duodiff(walk):
    said = printed_by(walk, "sampler.py", "out/public_duodiff")
    assert timesteps_told(said) == {"shallow": 2, "full": 2}  # 999, 749; 499, 249
    carried = torch.load("logs/shallow_public/celeba_uvit_last.pth", weights_only=True)["config"]
    assert carried["crop"] == "uvit128" and carried["diffusion_params"]["beta_schedule"] == "continuous_vp"


@pytest.mark.slow
def test_where_to_switch(walk):
    assert "chosen: t_switch" in printed_by(walk, "calibrate.py")
    assert "chosen: t_switch" in printed_by(walk, "sampler.py", "auto")
    assert Path("logs/calibration.yaml").exists() and Path("out/switch_auto/report/calibration.png").exists()


@pytest.mark.slow
def test_networks_for_their_part(walk):
    for name, expected in (("celeba_uvit_13", (0, 999)), ("full_499", (0, 499)), ("shallow_500", (500, 999))):
        config = torch.load(f"logs/{name}/celeba_uvit_last.pth", weights_only=True)["config"]
        assert (config["t_min"], config["t_max"]) == expected


@pytest.mark.slow
def test_cascades_and_caching(walk):
    said = printed_by(walk, "sampler.py", "cascade.yaml")
    assert timesteps_told(said) == {"network 1": 2, "network 2": 1, "network 3": 1}
    backbone = json.loads(Path("out/caching/report/statistics.json").read_text())["backbones"][0]
    assert backbone["timesteps_reusing"] == 2  # of 999, 749, 499, 249 the middle two


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
    assert len(pasted) == 14 and b"DuoDiff t_switch=300=a demo $1/samples_duo_300" in by_the_demo
    assert called("-c", "\n".join(pasted))[1] == by_the_demo
