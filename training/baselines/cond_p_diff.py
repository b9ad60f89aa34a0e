"""COND P-DIFF: autoencoder of adapter vectors, and latent diffusion conditioned on the task."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from service.errors import MissingDependencyError
from service.inference.base_model import resolve_device
from service.synthesis.normalizer import AdapterNormalizer
from training.baselines.base import TrainingTasks
from training.baselines.networks import Sampler, build_seeded, fit_network

PredictNoise = Callable[[Float[Tensor, "batch latent"], Int[Tensor, " batch"]], Tensor]
"""The noise in noisy latents at their timesteps."""


class Autoencoder(nn.Module):
    """1D CNN over the flat adapter vector, strided down by 4 a layer to a code, and back.

    Codes are standardised each by itself, so noise of a given size means the same to all.
    """

    def __init__(self, num_params: int, latent_dim: int, depth: int, width: int) -> None:
        super().__init__()
        self.num_params = num_params
        length = -(-num_params // 4**depth)  # after the last layer
        self.padded = length * 4**depth
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        for layer in range(depth):
            down += [
                nn.Conv1d(width if layer else 1, width, kernel_size=4, stride=4),
                nn.GroupNorm(1, width),
                nn.LeakyReLU(0.1),
            ]
            up += [
                nn.GroupNorm(1, width),
                nn.LeakyReLU(0.1),
                nn.ConvTranspose1d(
                    width, width if layer < depth - 1 else 1, kernel_size=4, stride=4
                ),
            ]
        self.encoder = nn.Sequential(
            *down,
            nn.Flatten(),
            nn.Linear(width * length, latent_dim),
            nn.LayerNorm(latent_dim, elementwise_affine=False),
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, width * length), nn.Unflatten(1, (width, length)), *up
        )

    def encode(self, adapters: Float[Tensor, "batch num_params"]) -> Float[Tensor, "batch latent"]:
        """Codes of normalised adapter vectors."""
        padded = functional.pad(adapters, (0, self.padded - self.num_params))
        codes: Tensor = self.encoder(padded[:, None])
        return codes

    def decode(self, codes: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch num_params"]:
        """Normalised adapter vectors."""
        adapters: Tensor = self.decoder(codes)[:, 0, : self.num_params]
        return adapters


class Denoiser(nn.Module):
    """Noise in a latent code, by a residual MLP on code, timestep and task vector."""

    def __init__(self, latent_dim: int, task_dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.width = width
        self.stem = nn.Linear(latent_dim, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.task = nn.Linear(task_dim, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 2 * width),
                nn.SiLU(),
                nn.Linear(2 * width, width),
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(width, latent_dim)

    def forward(
        self,
        codes: Float[Tensor, "batch latent"],
        timesteps: Int[Tensor, " batch"],
        vectors: Float[Tensor, "batch d_task"],
    ) -> Float[Tensor, "batch latent"]:
        """Predicted noise."""
        condition = self.time(embed_timesteps(timesteps, self.width)) + self.task(vectors)
        h = self.stem(codes)
        for block in self.blocks:
            h = h + block(h + condition)
        noise: Tensor = self.head(h)
        return noise


@dataclass
class CondPDiff:
    """Re-implementation of COND P-DIFF (Jin et al. 2024, arXiv 2408.01415), not the authors' code.

    Taken from there and from its ancestor P-DIFF (Wang et al. 2024, arXiv 2402.13144): a 1D CNN
    autoencoder trained with noise on its input and on its code, then a DDPM over the codes that
    is conditioned on the task's embedding. Different: the autoencoder ends in linear layers and
    standardises its codes; the denoiser is a residual MLP, where theirs is a 1D U-Net; the
    condition is the task vector of a random training wording. The defaults are ours, and the
    schedule is that of `diffusers`.

    Attributes:
        latent_dim: length of a code.
        depth: convolutional layers each way.
        width: channels. Each position of the shortest layer unfolds into `4**depth` values, which
            fewer channels cannot all reach: of the twelve shipped text adapters 0.32 was lost
            after 1,600 steps at depth 4, and 0.10 after 600 at depth 3 (64 channels, seed 0).
        input_noise: standard deviation on normalised adapters in training.
        code_noise: standard deviation on codes in training.
        autoencoder_steps: optimiser steps.
        denoiser_width: of the MLP.
        denoiser_depth: residual blocks.
        denoiser_steps: optimiser steps.
        batch_size: adapters per step of the autoencoder.
        denoiser_batch_size: codes per step of the denoiser.
        learning_rate: peak of both.
        num_timesteps: T of the linear schedule, beta from 1e-4 to 0.02.
        num_inference_steps: of the sampler.
        reconstruction_error: what the autoencoder loses of the training adapters, as a share of
            their squared distance to the soup: near 1, it only knows the soup; set by `fit`.
    """

    name: ClassVar[str] = "cond_p_diff"
    uses_target: ClassVar[bool] = False

    latent_dim: int = 64
    depth: int = 3
    width: int = 64
    input_noise: float = 0.001
    code_noise: float = 0.1
    autoencoder_steps: int = 2000
    denoiser_width: int = 256
    denoiser_depth: int = 4
    denoiser_steps: int = 4000
    batch_size: int = 8
    denoiser_batch_size: int = 64
    learning_rate: float = 3e-3
    num_timesteps: int = 1000
    num_inference_steps: int = 1000
    reconstruction_error: float = field(init=False)
    autoencoder: Autoencoder = field(init=False, repr=False)
    denoiser: Denoiser = field(init=False, repr=False)
    normalizer: AdapterNormalizer = field(init=False, repr=False)
    code_mean: Float[Tensor, " latent"] = field(init=False, repr=False)
    code_std: Float[Tensor, " latent"] = field(init=False, repr=False)

    def fit(self, tasks: TrainingTasks, seed: int) -> None:
        """Trains the autoencoder on all checkpoints, then the denoiser on their codes.

        Raises:
            MissingDependencyError: `diffusers` is not installed.
        """
        scheduler = build_scheduler(self.num_timesteps)
        sampler = Sampler.build(tasks)
        self.normalizer = tasks.normalizer
        self._fit_autoencoder(sampler, seed)
        batches = torch.split(sampler.adapters.to(resolve_device("auto")), self.batch_size)
        with torch.no_grad():
            codes = torch.cat([self.autoencoder.encode(batch) for batch in batches])
            decoded = [
                self.autoencoder.decode(part) for part in torch.split(codes, self.batch_size)
            ]
        lost = sum(float((a - b).square().sum()) for a, b in zip(decoded, batches, strict=True))
        self.reconstruction_error = lost / float(sampler.adapters.square().sum())
        self.code_mean, self.code_std = codes.mean(0), codes.std(0, correction=0).clamp_min(1e-6)
        self._fit_denoiser(sampler, (codes - self.code_mean) / self.code_std, scheduler, seed + 1)

    def generate(
        self, task_vector: Float[Tensor, " d_task"], seed: int
    ) -> Float[Tensor, " num_params"]:
        """Decodes a code that is drawn by the seed under the task vector."""
        vectors = task_vector[None].float().to(resolve_device("auto"))
        with torch.no_grad():
            code = sample_codes(
                lambda codes, timesteps: self.denoiser(codes, timesteps, vectors),
                torch.randn(1, self.latent_dim, generator=torch.Generator().manual_seed(seed)),
                build_scheduler(self.num_timesteps),
                self.num_inference_steps,
                seed,
            )
            decoded = self.autoencoder.decode(code * self.code_std + self.code_mean)
        return self.normalizer.denormalize(decoded[0].cpu())

    def _fit_autoencoder(self, sampler: Sampler, seed: int) -> None:
        num_params = sampler.adapters.shape[1]
        self.autoencoder = model = build_seeded(
            lambda: Autoencoder(num_params, self.latent_dim, self.depth, self.width), seed
        )
        adapters = sampler.adapters.to(resolve_device("auto"))

        def measure_loss(generator: torch.Generator) -> Tensor:
            chosen = sampler.draw_tasks(self.batch_size, generator)
            rows = adapters[sampler.draw_adapters(chosen, generator)]
            codes = model.encode(rows + self.input_noise * _noise_like(rows, generator))
            decoded = model.decode(codes + self.code_noise * _noise_like(codes, generator))
            return functional.mse_loss(decoded, rows)

        fit_network(
            model.parameters(),
            measure_loss,
            num_steps=self.autoencoder_steps,
            learning_rate=self.learning_rate,
            seed=seed,
        )

    def _fit_denoiser(
        self, sampler: Sampler, codes: Float[Tensor, "rows latent"], scheduler: Any, seed: int
    ) -> None:
        self.denoiser = model = build_seeded(
            lambda: Denoiser(
                self.latent_dim, sampler.task_dim, self.denoiser_width, self.denoiser_depth
            ),
            seed,
        )

        def measure_loss(generator: torch.Generator) -> Tensor:
            chosen = sampler.draw_tasks(self.denoiser_batch_size, generator)
            vectors = sampler.draw_wordings(chosen, generator).to(codes.device)
            clean = codes[sampler.draw_adapters(chosen, generator)]
            noise = _noise_like(clean, generator)
            timesteps = torch.randint(self.num_timesteps, (len(chosen),), generator=generator)
            timesteps = timesteps.to(codes.device)
            noisy = scheduler.add_noise(clean, noise, timesteps)
            return functional.mse_loss(model(noisy, timesteps, vectors), noise)

        fit_network(
            model.parameters(),
            measure_loss,
            num_steps=self.denoiser_steps,
            learning_rate=self.learning_rate,
            seed=seed,
        )


def build_scheduler(num_timesteps: int) -> Any:
    """DDPM (Ho et al. 2020) of `diffusers`: linear betas, predicts the noise, clips nothing.

    Raises:
        MissingDependencyError: `diffusers` is not installed.
    """
    try:
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    except ImportError as error:
        raise MissingDependencyError(
            "cond_p_diff needs the optional package 'diffusers': pip install 'icm-lora[train]'"
        ) from error
    return DDPMScheduler(
        num_train_timesteps=num_timesteps, beta_schedule="linear", clip_sample=False
    )


def sample_codes(
    predict_noise: PredictNoise,
    start: Float[Tensor, "batch latent"],
    scheduler: Any,
    num_steps: int,
    seed: int,
) -> Float[Tensor, "batch latent"]:
    """Ancestral sampling from pure noise at the last timestep down to a code.

    Args:
        predict_noise: the denoiser under its condition.
        start: noise of unit variance.
        scheduler: of `build_scheduler`, not shared with another call.
        num_steps: visited timesteps, at most those of the schedule.
        seed: of the noise that every step but the last adds.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + 1)
    codes = start.to(resolve_device("auto"))
    scheduler.set_timesteps(num_steps)
    for timestep in scheduler.timesteps.tolist():
        timesteps = torch.full((len(codes),), timestep, device=codes.device)
        noise = predict_noise(codes, timesteps)
        codes = scheduler.step(noise, timestep, codes, generator=generator, return_dict=False)[0]
    return codes


def embed_timesteps(timesteps: Int[Tensor, " batch"], width: int) -> Float[Tensor, "batch width"]:
    """Sinusoids of geometric periods (Vaswani et al. 2017); `width` is even."""
    half = torch.arange(width // 2, device=timesteps.device)
    angles = timesteps[:, None] * torch.exp(-math.log(10_000.0) * half / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _noise_like(values: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(values.shape, generator=generator).to(values.device)
