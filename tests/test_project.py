"""The project as a whole: importing has no effects, the commit hooks work, and the libraries are those it needs."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
import yaml

from common import __version__
from common.errors import EXTRAS, command
from tests.parsers import commands

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[1]
INCEPTION = "torch_fidelity.feature_extractor_inceptionv3"
SCRIPTS = ("train.py", "main.py", "sampler.py", "eesampler.py", "fid.py", "compare.py", "calibrate.py", "benchmark.py")


REFUSALS = {
    "--dataset folder": "--img_size",
    "--dataset folder --img_size 0": "--img_size",
    "--dataset celeba --img_size 64 --crop halve": "crop of celeba=halve",
    "--dataset celeba --img_size 64 --download": "cannot be downloaded",
}


@pytest.mark.parametrize(
    "script, argv, status, said",
    [(script, "--help", 0, f"usage: {script}") for script in SCRIPTS]
    + [(script, "--help", 0, "usage: pack.py") for script in ("pack.py", "data/pack.py")]
    + [(script, "--help", 0, "usage: export.py") for script in ("export.py", "training/checkpoint.py")]
    + [(f"experiments/{name}.py", "--help", 0, f"usage: {name}.py") for name in ("results", "plans")]
    + [("pack.py", argv, 2, said) for argv, said in REFUSALS.items()],
)
def test_help_and_refusals_need_no_torch(script, argv, status, said):
    code = f"""
import runpy, sys
sys.argv = ["{script}", *{argv.split()}]
sys.path.insert(0, ".")
try:
    runpy.run_path("{script}", run_name="__main__")
except SystemExit as ended:
    heavy = sorted({{"torch", "scipy", "matplotlib", "numpy", "PIL"}} & sys.modules.keys())
    sys.exit(f"imported {{heavy}}" if heavy else ended.code)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert said in (done.stderr if status else done.stdout)


@pytest.mark.slow
def test_importing_prints_nothing_and_touches_no_randomness():
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in ROOT.glob("[a-z]*/*.py")]
    modules += [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in ROOT.glob("[a-z]*/*/*.py")]
    modules = [m.removesuffix(".__init__") for m in modules if m.split(".")[0] not in ("tests", "scripts", "venv")]
    code = f"""
import importlib, torch
before = torch.get_rng_state()
for name in {sorted(modules)}:
    importlib.import_module(name)
assert torch.equal(before, torch.get_rng_state())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.skipif(shutil.which("git") is None, reason="git is needed to run the hooks")
def test_pre_commit_hooks(tmp_path):
    """The hooks install and pass on the project, and mend a badly formatted file."""

    def call(*command):
        return subprocess.run(command, cwd=tmp_path / "repo", capture_output=True, text=True, check=False)

    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    if not listed:
        pytest.skip("not a git checkout, so it cannot be told what belongs to the project")
    for name in listed.splitlines():
        (tmp_path / "repo" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "repo" / name)
    call("git", "init", "-q")
    call("git", "add", "-A")
    first = call(sys.executable, "-m", "pre_commit", "run", "--all-files")
    if "Could not find a version" in first.stdout + first.stderr or "ConnectionError" in first.stdout:
        pytest.skip("the hooks install from PyPI, which cannot be reached")
    assert first.returncode == 0, first.stdout + first.stderr
    (tmp_path / "repo" / "bad.py").write_text("import sys\nimport os\nprint( os,sys )\n")
    call("git", "add", "-A")
    assert call(sys.executable, "-m", "pre_commit", "run", "--all-files").returncode == 1
    assert (tmp_path / "repo" / "bad.py").read_text() == "import os\nimport sys\n\nprint(os, sys)\n"


def _bounds(name: str, relation: str) -> dict[str, str]:
    """The version of each package in a file of requirements, of which every line must name one."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    found = [re.fullmatch(rf"([a-z-]+){relation}(\d[\d.]*)(,<[\d.]+)?", line) for line in lines]
    assert all(found), [line for line, match in zip(lines, found, strict=True) if not match]
    return {match[1]: match[2] for match in found}


def _pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_the_scripts_install_what_the_project_asks_for():
    project = _pyproject()["project"]
    extras = project["optional-dependencies"]
    assert extras.keys() == {"eval", "latents", "efficientnet", "dev"}
    assert "duodiff[eval,latents]" in extras["dev"], "the tests need everything"
    apart = extras.pop("efficientnet")  # for one extractor, which few use
    assert apart == [line for line in (ROOT / "requirements-eval.txt").read_text().splitlines() if line[:1] != "#"]
    wanted = [*project["dependencies"], *(name for extra in extras.values() for name in extra)]
    wanted.remove("duodiff[eval,latents]")
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert sorted(wanted) == sorted(line for line in lines if line and not line.startswith("#"))


def test_sampling_needs_no_test_tools():
    base = " ".join(_pyproject()["project"]["dependencies"])
    assert not [name for name in ("pytest", "hypothesis", "ruff", "mypy", "pre-commit") if name in base]


def test_what_a_lacking_package_is_called(fails):
    """A package of an extra that is not installed ends in one line, which names the extra."""
    extras = _pyproject()["project"]["optional-dependencies"]
    named = {(name.split(">")[0].replace("-", "_"), extra) for extra in ("eval", "latents") for name in extras[extra]}
    assert set(EXTRAS.items()) == named | {("huggingface_hub", "latents")}, "diffusers brings the hub's client"

    @command
    def main(argv=None):
        raise ModuleNotFoundError("No module named 'scipy'", name=argv[0])

    fails(main, ["scipy.linalg"], "scipy is not installed", "pip install -e '.[eval]'")
    with pytest.raises(ModuleNotFoundError):
        main(["generation.missing"])


def test_an_installation_has_all_packages():
    include = _pyproject()["tool"]["setuptools"]["packages"]["find"]["include"]
    assert sorted(include) == sorted(f"{package}*" for package in PACKAGES)


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == __version__
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == __version__
    project = _pyproject()
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "common.__version__"}


@pytest.mark.parametrize("command_line", commands(), ids=str)
def test_every_script_tells_its_version(command_line, capsys):
    with pytest.raises(SystemExit) as ended:
        command_line.parser.parse_args(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"DuoDiff {__version__}\n"


def test_licences():
    """What NOTICE says about files is about files that are there, and the citation has the licence of the project."""
    said = (ROOT / "NOTICE").read_text("utf-8")
    paths = re.findall(r"^[a-z]+/\S+", said, re.MULTILINE)
    assert {"data/digits.npz", "experiments/emoji_classifier.pt"} <= set(paths)
    assert [path for path in paths if not (ROOT / path).is_file()] == []
    assert "MIT License" in (ROOT / "LICENSE").read_text("utf-8")
    assert _pyproject()["project"]["license"] == "MIT"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))["license"] == "MIT"


def _tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout, so it cannot be told what belongs to the project")
    return [path for name in done.stdout.splitlines() if (path := ROOT / name).exists()]


@pytest.mark.skipif(shutil.which("git") is None, reason="git lists the files")
def test_a_clone_is_small():
    sizes = {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in _tracked()}
    assert {name: size for name, size in sizes.items() if size > 20e6} == {}
    pictures = {name: size for name, size in sizes.items() if name.startswith("docs/") and name.endswith(".png")}
    assert pictures and {name: size for name, size in pictures.items() if size > 300e3} == {}


def test_the_lowest_versions_are_those_that_are_asked_for():
    assert _bounds("requirements-lowest.txt", "==") == _bounds("requirements.txt", ">=")


def test_the_lowest_versions_are_tested_beside_the_newest():
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]["test"]
    runs = [(run["python"], run.get("constraints")) for run in job["strategy"]["matrix"]["include"]]
    assert ("3.10", "requirements-lowest.txt") in runs and ("3.13", None) in runs
    assert job["env"] == {"CONSTRAINTS": "${{ matrix.constraints }}"}
    assert job["steps"][-1] == {"run": "bash .ci/run"}


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is needed to run the scripts")
def test_constraints_reach_pip(tmp_path):
    """What is installed follows from the requirements and the constraints; nothing is, where both are as before."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "environment.sh", tmp_path / "scripts")
    (tmp_path / "requirements.txt").write_text("torch>=2\n")
    (tmp_path / "low.txt").write_text("torch==2\n")
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@" >>calls.txt\n')
    python.chmod(0o755)

    def installed(constraints: str) -> list[str]:
        (tmp_path / "calls.txt").write_text("")
        environment = os.environ | {"CONSTRAINTS": constraints, "PYTHON": sys.executable}
        command = ["bash", "-euc", "source scripts/environment.sh"]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
        return [line.partition(" -r ")[2] for line in (tmp_path / "calls.txt").read_text().splitlines()]

    assert installed("") == ["requirements.txt"]
    assert installed("") == []
    assert installed("low.txt") == ["requirements.txt --constraint low.txt"]
    assert installed("low.txt") == []
    (tmp_path / "low.txt").write_text("torch==2.1\n")
    assert installed("low.txt") == ["requirements.txt --constraint low.txt"]
    assert installed("") == ["requirements.txt"]


# What the code takes from libraries that do not promise to keep it, and what would go without it.
UNPROMISED = {
    "diffusers.loaders.single_file_utils.convert_ldm_vae_checkpoint": "autoencoder_kl.pth is not read",
    f"{INCEPTION}.FeatureExtractorInceptionV3": "fid.py has no Inception features",
    f"{INCEPTION}.URL_INCEPTION_V3": "fid.py neither finds nor downloads the Inception weights",
    "torch_fidelity.metric_kid.kid_features_to_metric": "no --metrics kid",
    "torch_fidelity.metric_isc.isc_features_to_metric": "no --metrics is",
    "torch_fidelity.metric_prc.prc_features_to_metric": "no --metrics prc",
    "torchvision.datasets.utils.download_url": "CIFAR-10 is not downloaded",
    "torch._foreach_lerp_": "no --ema_decay",
    "torch.cpu._is_avx512_bf16_supported": "fp32 is taken, in silence, where the CPU has bf16 (AVX-512)",
    "torch.cpu._is_amx_tile_supported": "fp32 is taken, in silence, where the CPU has bf16 (AMX)",
    "torch.cpu._is_amx_fp16_supported": "--precision fp16 is refused on CPUs that have it",
    "torch.ops.mkldnn._is_mkldnn_bf16_supported": "every script fails on ARM CPUs",
    "torch.ops.mkldnn._is_mkldnn_fp16_supported": "--precision fp16 fails on ARM CPUs",
    "torch.distributed.fsdp.FSDPModule.set_requires_gradient_sync": "--fsdp averages the gradients of every part",
    "torch.distributed.tensor.DTensor.full_tensor": "--fsdp saves pieces of tensors",
    "yaml.SafeLoader.compose_node": "aliases in YAML files are followed, and may fill the memory",
}


@pytest.mark.parametrize("name", UNPROMISED)
def test_what_libraries_do_not_promise_is_there(name):
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{name} is gone: {UNPROMISED[name]} ({error})", pytrace=False)


def test_the_autoencoders_translation_takes_weights_and_settings():
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    inspect.signature(convert_ldm_vae_checkpoint).bind({}, {})


@pytest.mark.parametrize("option", ["kid_subsets", "kid_subset_size", "prc_neighborhood", "save_cpu_ram", "rng_seed"])
def test_options_of_the_scores_are_known(option):
    """torch-fidelity passes over options that it does not know, and takes its defaults."""
    from torch_fidelity.defaults import DEFAULTS

    assert option in DEFAULTS, f"torch-fidelity has no option {option}: scores are computed with another setting"


@pytest.mark.parametrize(("found_inf", "moved"), [(0.0, True), (1.0, False)])
def test_the_fused_optimizer_heeds_found_inf(found_inf, moved):
    """If not, a step whose gradient is not finite is taken, and ruins the weights."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0, fused=True)
    weight.grad = torch.ones(3)
    optimizer.found_inf = torch.tensor(found_inf)
    optimizer.step()
    # Adam's first step is of the length lr, against the gradient's sign.
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9 if moved else 1.0))
    assert optimizer.state[weight]["step"] == moved


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_the_solvers_state_is_where_it_is_set(name):
    """If not, dpmsolver++ or unipc go through timesteps of their own, or mix the outputs of two networks."""
    scheduler = getattr(importlib.import_module("diffusers"), name)()
    scheduler.set_timesteps(3)
    state = {"timesteps", "sigmas", "lower_order_nums"} | ({"last_sample"} if name.startswith("UniPC") else set())
    assert state <= vars(scheduler).keys()
    scheduler.set_begin_index(0)
    assert scheduler.begin_index == 0


def test_the_prefix_of_compiled_networks():
    """If it is another, weights that were saved from a compiled network are refused."""
    names = torch.compile(torch.nn.Linear(1, 1)).state_dict()
    assert set(names) == {"_orig_mod.weight", "_orig_mod.bias"}


# What stands above may import what stands below, never the other way round.
PACKAGES = ("common", "data", "diffusion", "models", "training", "generation", "evaluation", "calibration")
PACKAGES += ("benchmarking", "experiments")


def imports(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            found.add(node.module)
    return found


def test_packages_import_no_script_and_not_each_other_in_a_circle():
    assert set(PACKAGES) == {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    scripts = {path.stem for path in ROOT.glob("*.py")}
    below: dict[str, set[str]] = {}
    for package in PACKAGES:
        files = list((ROOT / package).rglob("*.py"))
        names = {path: {name.split(".")[0] for name in imports(path)} for path in files}
        assert not {str(path): upward for path in files if (upward := names[path] & scripts)}
        below[package] = set().union(*names.values()) & set(PACKAGES) - {package}
    assert "common" in below["data"], "imports are found"
    TopologicalSorter(below).prepare()  # raises CycleError
    assert "diffusion" not in below["models"] and "models" not in below["diffusion"], "neither knows the other"
