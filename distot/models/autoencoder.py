"""Autoencoders: small networks between data and latents, kept in safetensors files that say what rebuilds them.

Legend: B data, k dimension of the latents, c channels, h x w pixels.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from distot.errors import InputError
from distot.models.datasets import floats
from distot.store import new_file

FORMAT = "distot-autoencoder"
ROWS = 4096  # encoded or decoded at once
SMALLEST = 4  # side of the smallest map of a convolutional network

Kind = Literal["dense", "convolutional"]


@dataclass(frozen=True)
class Spec:
    """An autoencoder but for its weights.

    shape: of a datum, (d,) for vectors or (c, h, w) for images with values in [0, 1]. latent: k. kind: "dense" or, for
    images, "convolutional". width: of dense layers, or channels of the largest maps. random: whether the encoder gives
    a Gaussian for each datum instead of a point. Raises InputError for values that make no sense.
    """

    shape: tuple[int, ...]
    latent: int
    kind: Kind = "dense"
    width: int = 256
    random: bool = False

    def __post_init__(self) -> None:
        if len(self.shape) not in (1, 3) or min(self.shape) < 1:
            raise InputError(f"a datum is a vector (d,) or an image (c, h, w), not of shape {self.shape}")
        if self.kind not in ("dense", "convolutional"):
            raise InputError(f"kind is dense or convolutional, not {self.kind!r}")
        if self.kind == "convolutional" and not self.images:
            raise InputError(f"a convolutional network is for images; data of shape {self.shape} take kind='dense'")
        if self.latent < 1 or self.width < 1:
            raise InputError(f"latent and width must be at least 1, not {self.latent} and {self.width}")

    @property
    def images(self) -> bool:
        return len(self.shape) == 3

    @property
    def numbers(self) -> int:
        """In a datum."""
        return int(torch.Size(self.shape).numel())


def dense(sizes: list[int]) -> list[nn.Module]:
    """Linear layers with SiLU between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.SiLU()]
    return layers[:-1]


def _sides(spec: Spec) -> list[tuple[int, int]]:
    """Sizes of the maps of a convolutional network, from the image down."""
    sides = [(spec.shape[1], spec.shape[2])]
    while min(sides[-1]) > SMALLEST:
        sides.append(((sides[-1][0] + 1) // 2, (sides[-1][1] + 1) // 2))
    return sides


def encoder(spec: Spec, out: int) -> nn.Module:
    """From data (B, ...) to (B, out)."""
    if spec.kind == "dense":
        return nn.Sequential(nn.Flatten(), *dense([spec.numbers, spec.width, spec.width, out]))
    sides, channels = _sides(spec), spec.width
    layers: list[nn.Module] = [nn.Conv2d(spec.shape[0], channels, 3, padding=1), nn.SiLU()]
    for level in range(len(sides) - 1):
        layers += [nn.Conv2d(channels, spec.width << level, 3, stride=2, padding=1), nn.SiLU()]
        channels = spec.width << level
    layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.SiLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(channels * sides[-1][0] * sides[-1][1], out))


def _decoder(spec: Spec) -> nn.Module:
    if spec.kind == "dense":
        layers = dense([spec.latent, spec.width, spec.width, spec.numbers])
        return nn.Sequential(*layers, *([nn.Sigmoid()] if spec.images else []), nn.Unflatten(1, spec.shape))
    sides = _sides(spec)[::-1]
    channels = spec.width << max(len(sides) - 2, 0)
    low = (channels, *sides[0])
    layers = [nn.Linear(spec.latent, int(torch.Size(low).numel())), nn.SiLU(), nn.Unflatten(1, low)]
    for side in sides[1:]:
        after = max(channels // 2, spec.width)
        layers += [nn.Upsample(side), nn.Conv2d(channels, after, 3, padding=1), nn.SiLU()]
        channels = after
    return nn.Sequential(*layers, nn.Conv2d(channels, spec.shape[0], 3, padding=1), nn.Sigmoid())


@dataclass(frozen=True)
class Code:
    """What an encoder says of B data: means (B, k), and logarithms of variances (B, k) if it is random."""

    mean: Tensor
    log_variance: Tensor | None

    def draw(self, noise: Tensor) -> Tensor:
        """Latents (B, k), by standard normal ``noise`` (B, k) if the encoder is random."""
        return self.mean if self.log_variance is None else self.mean + noise * (0.5 * self.log_variance).exp()


class Autoencoder(nn.Module):
    """Encoder and decoder; the weights are a function of ``spec`` and ``seed``."""

    def __init__(self, spec: Spec, seed: int = 0) -> None:
        super().__init__()
        self.spec = spec
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = encoder(spec, spec.latent * (2 if spec.random else 1))
            self.decoder = _decoder(spec)

    def code(self, x: Tensor) -> Code:
        """Of data (B, ...) as floats."""
        out = self.encoder(x)
        return Code(*out.chunk(2, dim=1)) if self.spec.random else Code(out, None)

    def forward(self, x: Tensor) -> Tensor:
        """Data (B, ...) that went through the latents and back."""
        decoded: Tensor = self.decoder(self.code(x).mean)
        return decoded

    def check(self, x: Tensor) -> None:
        """Raises InputError for data of another shape, NaN, or images outside [0, 1]."""
        if tuple(x.shape[1:]) != self.spec.shape or len(x) == 0:
            raise InputError(
                f"this autoencoder is for data of shape (B, {', '.join(map(str, self.spec.shape))}), "
                f"not {tuple(x.shape)}; resize them, or train another one"
            )
        if x.dtype == torch.uint8:
            if not self.spec.images:
                raise InputError("vectors must be floating point numbers, not bytes")
            return
        if not bool(torch.isfinite(x).all()):
            raise InputError("the data contain NaN or Inf; remove or mend them")
        if self.spec.images and (float(x.min()) < 0 or float(x.max()) > 1):
            raise InputError(
                f"images must have values in [0, 1], or be bytes; these are between {float(x.min()):g} and "
                f"{float(x.max()):g}: divide by 255, or shift and scale them"
            )

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Latents (B, k) of data (B, ...), on the CPU; of a random encoder the means. Raises as ``check``."""
        self.check(x)
        device = next(self.parameters()).device
        return torch.cat([self.code(floats(part).to(device)).mean.cpu() for part in x.split(ROWS)])

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Data (B, ...) of latents (B, k), on the CPU; images in [0, 1]. Raises InputError for another k or NaN."""
        if z.ndim != 2 or z.shape[1] != self.spec.latent:
            raise InputError(f"latents of this autoencoder have shape (B, {self.spec.latent}), not {tuple(z.shape)}")
        if not bool(torch.isfinite(z).all()):
            raise InputError("the latents contain NaN or Inf")
        device = next(self.parameters()).device
        made = [self.decoder(part.float().to(device)).cpu() for part in z.split(ROWS)]
        return torch.cat(made) if made else torch.empty(0, *self.spec.shape)

    @property
    def fingerprint(self) -> str:
        """Hash of all weights; latents carry that of the encoder they came from."""
        found = hashlib.sha256(json.dumps(asdict(self.spec), sort_keys=True).encode())
        for name, value in sorted(self.state_dict().items()):
            found.update(name.encode())
            found.update(value.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def save(self, file: str | Path, **about: Any) -> None:
        """Writes a safetensors file; ``about`` are words to keep with it. A file that is there is replaced."""
        words = {"format": FORMAT, "spec": json.dumps(asdict(self.spec)), "about": json.dumps(about)}
        with new_file(Path(file)) as place:
            save_file(
                {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}, place, words
            )

    @classmethod
    def load(cls, file: str | Path, device: str = "cpu") -> Autoencoder:
        """The autoencoder in a file. Raises InputError if there is none, or the file is damaged."""
        try:
            with safe_open(str(file), "pt") as opened:
                words = opened.metadata() or {}
                weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file} cannot be read: {error}") from error
        if words.get("format") != FORMAT:
            raise InputError(f"{file} is not an autoencoder of distot")
        spec = json.loads(words["spec"])
        model = cls(Spec(**spec | {"shape": tuple(spec["shape"])}))
        model.load_state_dict(weights)
        return model.to(device).eval()


def about(file: str | Path) -> dict[str, Any]:
    """The words that ``save`` was given. Raises InputError if the file cannot be read."""
    try:
        with safe_open(str(file), "pt") as opened:
            return dict(json.loads((opened.metadata() or {})["about"]))
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
