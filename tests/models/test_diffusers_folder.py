"""Networks of diffusers from their folders: our samples are those of diffusers' own pipelines for the same noise."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
)
from safetensors.torch import save_file

import calibrate as calibrate_script
import eesampler as eesampler_script
import sampler as sampler_script
from common.errors import InputError
from common.images import read_png
from common.options import SolverSettings
from diffusion import NoiseSchedule
from diffusion.matching import own_timesteps
from diffusion.sampling import Stage, sample
from diffusion.schedulers import named_schedule, process_of
from generation.run import readable, solver_of
from models.backbone import Backbone
from models.flops import backbone_flops
from models.inference import BackboneDenoiser
from models.loading import Network, load_network
from tests.conftest import perturbed
from tests.folders import equal, samples

CPU = torch.device("cpu")
ATTENTION = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
UNET = {
    **{"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "layers_per_block": 1},
    **{"norm_num_groups": 4, "attention_head_dim": 8, **ATTENTION},
}
DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 4, "out_channels": 8}
STEPS = {"num_train_timesteps": 40, "clip_sample": False}


class Queue:
    """The noise of a run, in the order in which it is drawn: for ours, and for a pipeline's `randn_tensor`."""

    def __init__(self, batch: int):
        self.batch, self.generator = batch, torch.Generator().manual_seed(7)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(self.batch, *shape, generator=self.generator)


def noisy(network: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def opened(path, stated=()) -> Network[Backbone]:
    return load_network(path, dict(stated), Backbone, process_of=process_of)


def sampled(path, settings: SolverSettings, batch: int, y=None, scale: float = 0.0) -> torch.Tensor:
    """As sampler.py does it."""
    network = opened(path)
    solver, timesteps = solver_of(settings, [network.config])
    times = own_timesteps(network.config.diffusion_params, solver.schedule, timesteps)
    denoiser = BackboneDenoiser(network.module, times, torch.float32, CPU)
    stages = [Stage(readable(denoiser, network.config, solver, scale), timesteps)]
    return sample(stages, solver, Queue(batch), network.config.model_params.image_shape, y)


def of_pipeline(pipeline, monkeypatch, batch: int, **kwargs) -> torch.Tensor:
    """The pipeline's images in [-1, 1], from the queue's noise."""
    queue = Queue(batch)
    for module in (type(pipeline).__module__, type(pipeline.scheduler).__module__):
        monkeypatch.setattr(f"{module}.randn_tensor", lambda shape, **_: queue(*shape[1:]))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(**kwargs, output_type="pt").images
    return 2 * images - 1


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_ddpm_is_that_of_its_pipeline(schedule, prediction, tmp_path, monkeypatch):
    clip = schedule == "squaredcos_cap_v2"
    scheduler = DDPMScheduler(beta_schedule=schedule, prediction_type=prediction, **STEPS | {"clip_sample": clip})
    pipeline = DDPMPipeline(noisy(UNet2DModel(**UNET)), scheduler)
    pipeline.save_pretrained(tmp_path / "ddpm")
    want = of_pipeline(pipeline, monkeypatch, 3, batch_size=3, num_inference_steps=40)
    got = sampled(tmp_path / "ddpm", SolverSettings(clip_x0=clip), 3).clamp(-1, 1)
    assert (want.abs() < 1).float().mean() > 0.05, "more than black and white"
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_is_that_of_its_pipeline(eta, tmp_path, monkeypatch):
    scheduler = DDIMScheduler(timestep_spacing="trailing", **STEPS)
    pipeline = DDIMPipeline(noisy(UNet2DModel(**UNET)), scheduler)
    pipeline.save_pretrained(tmp_path / "ddim")
    want = of_pipeline(pipeline, monkeypatch, 2, batch_size=2, num_inference_steps=20, eta=eta)
    got = sampled(tmp_path / "ddim", SolverSettings(solver="ddim", steps=20, eta=eta), 2).clamp(-1, 1)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3)


def dit_pipeline(**changes):
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, scaling_factor=0.3, **blocks)
    scheduler = DDIMScheduler(timestep_spacing="trailing", **STEPS)
    return DiTPipeline(perturbed_a_little(DiTTransformer2DModel(**DIT | changes)), vae.eval(), scheduler)


def perturbed_a_little(network):
    perturbed(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter *= 0.4
    return network.eval()


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_dit_is_that_of_its_pipeline(scale, tmp_path, monkeypatch):
    """A learned variance is dropped, all channels are guided, latents are scaled by the autoencoder's own factor."""
    pipeline = dit_pipeline()
    pipeline.save_pretrained(tmp_path / "dit")
    network = opened(tmp_path / "dit")
    assert (network.config.classes, network.config.no_class) == (range(1000), 1000)
    assert network.config.autoencoder.scale_factor == 0.3

    from models.autoencoder import image_maker

    want = of_pipeline(pipeline, monkeypatch, 2, class_labels=[7, 207], guidance_scale=scale, num_inference_steps=10)
    latents = sampled(tmp_path / "dit", SolverSettings(solver="ddim", steps=10), 2, torch.tensor([7, 207]), scale - 1)
    got = image_maker(network.config, CPU)(latents).clamp(-1, 1)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3)


def test_classes_of_a_unet_are_its_own(tmp_path):
    network = noisy(UNet2DModel(**UNET, num_class_embeds=5))
    network.save_pretrained(tmp_path / "net")
    ours = opened(tmp_path / "net", {"real_classes": 4})
    assert (ours.config.classes, ours.config.no_class) == (range(4), 4)
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 70]), torch.tensor([0, 4])
    torch.testing.assert_close(ours.module(x, t, y), network(x, t, y).sample)
    with pytest.raises(InputError, match="missing"):
        ours.module(x, t)


def test_names_of_older_files(tmp_path):
    """Attention had other names in the files of the first releases, the public networks' among them."""
    network = noisy(UNet2DModel(**UNET))
    network.save_pretrained(tmp_path / "net")
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = network.state_dict()
    for new, old in older.items():
        weights = {name.replace(new, old): value for name, value in weights.items()}
    assert weights.keys() != network.state_dict().keys()
    save_file(weights, tmp_path / "net" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    x = torch.randn(1, 1, 8, 8)
    ours = opened(tmp_path / "net").module
    torch.testing.assert_close(ours(x, 7), network(x, torch.tensor([7])).sample)


def test_weights_in_several_files_load_without_a_bar(tmp_path, capsys):
    network = noisy(UNet2DModel(**UNET))
    network.save_pretrained(tmp_path / "net", max_shard_size=10_000)
    assert len(list((tmp_path / "net").glob("*.safetensors"))) > 2
    x = torch.randn(1, 1, 8, 8)
    torch.testing.assert_close(opened(tmp_path / "net").module(x, 7), network(x, torch.tensor([7])).sample)
    assert capsys.readouterr() == ("", "")


def test_between_timesteps_in_half_precision(tmp_path):
    """bf16 has no 998, and a network that meets another process is told 997.5: of the time nothing is rounded."""
    network = noisy(UNet2DModel(**UNET))
    network.save_pretrained(tmp_path / "net")
    module = opened(tmp_path / "net").module
    denoiser = BackboneDenoiser(module, {0: 997.5, 1: 998.0}, torch.bfloat16, CPU)
    assert [float(denoiser.time_tokens[k]) for k in (0, 1)] == [997.5, 998.0]
    x = torch.randn(1, 1, 8, 8)
    want = network(x, torch.tensor([997.5])).sample
    assert 0 < (denoiser(x, 0, None) - want).abs().max() < 0.1 * want.abs().max()


def test_operations_are_those_of_a_convolution(tmp_path):
    """At least: of the first and the last layer, 3 x 3 at 8 x 8 pixels."""
    network = noisy(UNet2DModel(**UNET))
    network.save_pretrained(tmp_path / "net")
    flops = backbone_flops(opened(tmp_path / "net").module)
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) > 10
    assert flops > 2 * (2 * 64 * 9 * 8 * 1)


@pytest.fixture
def pair(tmp_path, full):
    """A pipeline with the noise schedule and the images of the tests' U-ViT, and that."""
    torch.manual_seed(0)
    scheduler = DDPMScheduler(num_train_timesteps=20, clip_sample=False)
    DDPMPipeline(noisy(UNet2DModel(**UNET)), scheduler).save_pretrained(tmp_path / "unet")
    return tmp_path / "unet", full


def test_one_beside_a_uvit(pair, tmp_path, run_quietly):
    unet, uvit = pair
    flags = ["--n_samples", 2, "--device", "cpu", "--quiet", "--output_folder", tmp_path / "out"]
    run_quietly(
        sampler_script.main, ["--checkpoint_path", uvit, "--checkpoint_path_late", unet, "--t_switch", 9, *flags]
    )
    about = json.loads((tmp_path / "out" / "report" / "run.json").read_text())
    assert [network["model"] for network in about["networks"]] == ["uvit", "diffusers"]
    assert len({network["sha256"] for network in about["networks"]}) == 2

    measured = ["--checkpoint_path", uvit, unet, "--dataset", "digits", "--n_images", 8, "--batch_size", 4]
    measured += ["--output", tmp_path / "stages.yaml", "--device", "cpu", "--quiet"]
    run_quietly(calibrate_script.main, measured)
    again = ["--stages", tmp_path / "stages.yaml", *flags[:-1], tmp_path / "again"]
    run_quietly(sampler_script.main, again)
    assert len(list((tmp_path / "again").glob("*.png"))) == 2


def test_a_run_goes_on_with_the_same_folder_alone(pair, tmp_path, run_quietly, fails):
    flags = ["--n_samples", 2, "--device", "cpu", "--quiet", "--output_folder", tmp_path / "out"]
    run_quietly(sampler_script.main, ["--checkpoint_path", pair[0], *flags])
    noisy(UNet2DModel(**UNET)).save_pretrained(pair[0] / "unet")
    fails(sampler_script.main, ["--checkpoint_path", pair[0], *flags], "another run", "sha256")


def test_a_dit_pipeline_by_command(tmp_path, run_quietly):
    dit_pipeline().save_pretrained(tmp_path / "dit")
    flags = ["--n_samples", 2, "--device", "cpu", "--quiet", "--output_folder", tmp_path / "out"]
    argv = ["--checkpoint_path", tmp_path / "dit", *flags, "--class_id", 7, 207, "--guidance_scale", 3]
    run_quietly(sampler_script.main, [*argv, "--solver", "ddim", "--steps", 4])
    assert read_png(tmp_path / "out" / "000001.png").shape == (3, 4, 4)
    # Another autoencoder than the folder's own.
    shutil.copytree(tmp_path / "dit" / "vae", tmp_path / "vae")
    argv[argv.index(tmp_path / "out")] = tmp_path / "out2"
    vae = ["--autoencoder_checkpoint_path", tmp_path / "vae"]
    run_quietly(sampler_script.main, [*argv, "--solver", "ddim", "--steps", 4, *vae])
    assert (tmp_path / "out2" / "000001.png").read_bytes() == (tmp_path / "out" / "000001.png").read_bytes()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_offloading_changes_no_image(precision, tmp_path, run_quietly):
    """The position table of a DiT is in no file, and stays; later batches read the folders again."""
    for name in ("early", "late"):
        dit_pipeline().save_pretrained(tmp_path / name)
    argv = ["--checkpoint_path", tmp_path / "early", "--checkpoint_path_late", tmp_path / "late", "--t_switch", 19]
    argv += ["--solver", "ddim", "--steps", 4, "--n_samples", 3, "--batch_size", 2, "--device", "cpu", "--quiet"]
    for name, flags in (("out", []), ("offloaded", ["--offload"])):
        given = [*argv, "--precision", precision, *flags, "--output_folder", tmp_path / name]
        run_quietly(sampler_script.main, given)
    assert equal(samples(tmp_path / "out"), samples(tmp_path / "offloaded"))


def test_the_legacy_name_of_a_dit(tmp_path):
    pipeline = dit_pipeline()
    pipeline.save_pretrained(tmp_path / "dit")
    for path in (tmp_path / "dit" / "model_index.json", tmp_path / "dit" / "transformer" / "config.json"):
        path.write_text(path.read_text().replace("DiTTransformer2DModel", "Transformer2DModel"))
    x, y = torch.randn(1, 4, 4, 4), torch.tensor([3])
    want = pipeline.transformer(x, torch.tensor([7]), y).sample[:, :4]
    torch.testing.assert_close(opened(tmp_path / "dit").module(x, 7, y), want)


@pytest.fixture
def refused(pair, tmp_path, fails):
    def check(*words, flags=()):
        argv = ["--checkpoint_path", pair[0], "--output_folder", tmp_path / "out", "--device", "cpu", *flags]
        fails(sampler_script.main, argv, *words)
        assert not (tmp_path / "out").exists()

    return check


class TestBadInput:
    def test_pickles_alone(self, pair, refused):
        network = pair[0] / "unet"
        (network / "diffusion_pytorch_model.safetensors").rename(network / "diffusion_pytorch_model.bin")
        refused("has only pickles (diffusion_pytorch_model.bin)", ".safetensors")

    def test_no_weights(self, pair, refused):
        (pair[0] / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        refused("has no weights")

    def test_cut_short(self, pair, refused):
        path = pair[0] / "unet" / "diffusion_pytorch_model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        refused("not readable as a UNet2DModel")

    @pytest.mark.parametrize("shards", [1, 4])
    def test_not_finite(self, shards, pair, refused):
        network = UNet2DModel(**UNET)
        network.conv_in.weight.data[0] = torch.nan
        shutil.rmtree(pair[0] / "unet")
        network.save_pretrained(pair[0] / "unet", max_shard_size=4 * network.num_parameters() // shards + 1000)
        assert (len(list((pair[0] / "unet").glob("*.safetensors"))) > 1) == (shards > 1)
        refused("conv_in.weight contains numbers that are not finite")

    def test_weights_of_another_network(self, pair, refused):
        UNet2DModel(**UNET | {"layers_per_block": 2}).save_pretrained(pair[0] / "other")
        shutil.copy(pair[0] / "other" / "config.json", pair[0] / "unet")
        refused("unet")

    def test_a_network_of_any_size(self, pair, refused, modest_memory):
        path = pair[0] / "unet" / "config.json"
        content = json.loads(path.read_text()) | {"block_out_channels": [40000, 40000], "norm_num_groups": 4}
        path.write_text(json.dumps(content))
        refused("more than the weights' files have bytes")

    @pytest.mark.parametrize(
        ("file", "key", "value", "words"),
        [
            ("unet/config.json", "sample_size", None, ["sample_size none"]),
            ("unet/config.json", "sample_size", [8, 16], ["sample_size a list"]),
            ("unet/config.json", "out_channels", 3, ["out_channels 3"]),
            ("unet/config.json", "time_embedding_type", "fourier", ["time_embedding_type 'fourier'"]),
            ("unet/config.json", "class_embed_type", "timestep", ["class_embed_type"]),
            ("unet/config.json", "block_out_channels", 7, ["config.json: a UNet2DModel with block_out_channels 7"]),
            ("unet/config.json", "num_class_embeds", "ten", ["num_classes"]),
            ("scheduler/scheduler_config.json", "prediction_type", "flow_prediction", ["'flow_prediction'", "epsilon"]),
            ("scheduler/scheduler_config.json", "prediction_type", ["epsilon"], ["a list", "epsilon"]),
            ("scheduler/scheduler_config.json", "beta_schedule", "sigmoid", ["beta_schedule 'sigmoid'", "linear"]),
            ("scheduler/scheduler_config.json", "rescale_betas_zero_snr", True, ["rescale_betas_zero_snr"]),
            (
                "scheduler/scheduler_config.json",
                "trained_betas",
                [0.1, 0.3, 0.2],
                ["trained_betas", "no supported noise schedule"],
            ),
            ("scheduler/scheduler_config.json", "trained_betas", "x", ["trained_betas", "numbers"]),
            ("scheduler/scheduler_config.json", "beta_start", "low", ["beta_start"]),
            ("model_index.json", "unet", ["diffusers", "UNet3D"], ["model_index.json", "UNet3D", "UNet2DModel"]),
            ("model_index.json", "unet", ["my_code", "UNet2DModel"], ["model_index.json", "wanted one UNet2DModel"]),
        ],
    )
    def test_what_is_not_known_here(self, file, key, value, words, pair, refused):
        path = pair[0] / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
        refused(*words)

    def test_flags_that_contradict_it(self, refused):
        refused("parametrization (predict_noise and predict_v)", flags=["--parametrization", "predict_v"])
        refused("depth belongs to model uvit", flags=["--depth", 3])

    def test_what_it_cannot_do(self, pair, refused, tmp_path, fails):
        refused("--reuse_every", "does not support it", flags=["--reuse_every", 2])
        argv = ["--checkpoint_path", pair[0], "--output_folder", tmp_path / "out", "--threshold", 0.1]
        fails(eesampler_script.main, [*argv, "--device", "cpu"], "is a diffusers", "sampler.py samples from it")

    def test_a_folder_of_something_else(self, tmp_path, fails):
        (tmp_path / "empty").mkdir()
        argv = ["--output_folder", tmp_path / "out", "--device", "cpu", "--checkpoint_path"]
        fails(sampler_script.main, [*argv, tmp_path / "empty"], "is a folder", "model_index.json")
        (tmp_path / "empty" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
        fails(sampler_script.main, [*argv, tmp_path / "empty"], "describes 'AutoencoderKL'", "UNet2DModel")
        (tmp_path / "empty" / "config.json").write_text("[]")
        fails(sampler_script.main, [*argv, tmp_path / "empty"], "wanted a mapping")

    def test_another_shape(self, pair, shallow, tmp_path, fails):
        UNet2DModel(**UNET | {"in_channels": 3, "out_channels": 3}).save_pretrained(pair[0] / "unet")
        argv = ["--checkpoint_path", shallow, "--checkpoint_path_late", pair[0], "--t_switch", 9]
        fails(sampler_script.main, [*argv, "--output_folder", tmp_path / "out"], "image shape (1, 8, 8 and 3, 8, 8)")


def test_a_lone_model_takes_its_process_from_the_flags(tmp_path, run_quietly, caplog):
    noisy(UNet2DModel(**UNET)).save_pretrained(tmp_path / "net")
    stated = {"parametrization": "predict_v", "diffusion_params": {"beta_schedule": "cosine", "num_timesteps": 30}}
    network = opened(tmp_path / "net", stated)
    assert network.config.parametrization == "predict_v"
    assert network.config.diffusion_params.schedule["beta_schedule"] == "cosine"
    assert "has no scheduler" in caplog.text


@pytest.mark.parametrize(
    "schedule",
    [
        {"beta_schedule": "linear", "beta_start": 2e-4, "beta_end": 0.03},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "continuous_vp", "beta_start": 1e-4, "beta_end": 0.02},
        {"beta_schedule": "cosine"},
        {"beta_schedule": "rectified_flow"},
    ],
)
def test_trained_betas_are_known_again(schedule):
    betas = NoiseSchedule(num_timesteps=500, **schedule).betas
    in_32_bits = betas.float().tolist()
    found = NoiseSchedule(**process_of({"trained_betas": in_32_bits}, "f")["diffusion_params"])
    np.testing.assert_allclose(found.alphas_cumprod.numpy(), torch.cumprod(1 - betas, 0).numpy(), rtol=1e-4)
    with pytest.raises(InputError, match="f fit no supported noise schedule"):
        named_schedule([*in_32_bits[:250], *in_32_bits[255:]], "f")
