"""One loop that trains every autoencoder of the family, and goes on where it was interrupted.

Legend: N data, B data of a batch, k dimension of the latents.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distot.errors import InputError
from distot.fingerprint import Fingerprint
from distot.models.autoencoder import Autoencoder
from distot.models.datasets import floats
from distot.models.penalties import Penalty
from distot.store import new_file


@dataclass(frozen=True)
class Training:
    """How long and how fast. ``seed`` decides the order of the data and all noise. Raises InputError."""

    epochs: int = 30
    batch: int = 256
    rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 2:
            raise InputError(f"training takes at least 1 epoch of batches of 2, not {self.epochs} of {self.batch}")
        if not 0 < self.rate < 1:
            raise InputError(f"the rate is between 0 and 1, not {self.rate}")
        if not 0 <= self.seed < 1 << 32:
            raise InputError(f"a seed is a number of 32 bits, not {self.seed}")


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to: means of ½|x - G(z)|² and of the weighted penalty over the batches."""

    number: int
    epochs: int
    cost: float
    penalty: float


def train(
    model: Autoencoder,
    data: Tensor,
    penalty: Penalty | None = None,
    training: Training | None = None,
    *,
    device: str = "cpu",
    state: str | Path | None = None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> list[Epoch]:
    """Trains an autoencoder on data (N, ...) by E ½|x - G(z)|² + penalty, and leaves it on the CPU.

    state: a file that is written after every epoch; the same call finds it and goes on behind it, with the same result
    as if never interrupted, bit for bit on a CPU. on_epoch: told of every epoch. On a GPU networks run in bfloat16.

    Raises InputError for data that do not fit the model, N < 2, or a state of another training.
    """
    loop = _Loop(model, data, penalty or Penalty(), training or Training(), torch.device(device))
    history = [] if state is None else loop.load(Path(state))
    for number in range(len(history), loop.training.epochs):
        history.append(loop.epoch(number))
        if state is not None:
            loop.save(Path(state), history)
        on_epoch(history[-1])
    model.cpu().eval()
    return history


class _Loop:
    """Model, penalty and optimiser on their device."""

    def __init__(
        self, model: Autoencoder, data: Tensor, penalty: Penalty, training: Training, device: torch.device
    ) -> None:
        model.check(data)
        if len(data) < 2:
            raise InputError("there must be at least 2 data to train on")
        if penalty.random != model.spec.random:
            raise InputError(f"this penalty takes random={penalty.random} in the Spec, not {model.spec.random}")
        self.words = _words(model, data, penalty, training)
        self.model, self.data, self.penalty = model.to(device).train(), data, penalty.to(device)
        self.training, self.device = training, device
        self.adam = torch.optim.Adam(model.parameters(), training.rate)
        self.batches = max(1, len(data) // training.batch)  # what is left of an order fills no batch
        self.scale = float(floats(data).flatten(1).var(dim=0).sum()) / 2

    def epoch(self, number: int) -> Epoch:
        training = self.training
        self.penalty.begin(number, self.latents)
        random = torch.Generator().manual_seed(training.seed << 20 | number)
        order, sums = torch.randperm(len(self.data), generator=random), torch.zeros(2, dtype=torch.float64)
        for batch in range(self.batches):
            done = (number + batch / self.batches) / training.epochs
            self.adam.param_groups[0]["lr"] = training.rate * 0.5 * (1 + math.cos(math.pi * done))
            sums += self.step(order[batch * training.batch : (batch + 1) * training.batch], random)
        cost, penalty = (sums / self.batches).tolist()
        return Epoch(number, training.epochs, cost, penalty)

    def step(self, index: Tensor, random: torch.Generator) -> Tensor:
        """One step on the data ``index``; cost and penalty (2,)."""
        model, penalty, device = self.model, self.penalty, self.device
        x = floats(self.data[index]).to(device)
        draw, noise = torch.randn(2, len(index), model.spec.latent, generator=random).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            code = model.code(x)
            z = code.draw(draw)
            y = model.decoder(z)
        z, cost = z.float(), 0.5 * (y.float() - x).square().flatten(1).sum(dim=1).mean()
        penalty.learn(z, noise)
        extra = penalty(code, z, noise, index.to(device), cost.detach(), model.spec.numbers)
        extra = extra if penalty.random else self.scale * extra
        self.adam.zero_grad()
        (cost + extra).backward()
        self.adam.step()
        return torch.stack([cost, extra]).detach().cpu().double()

    def latents(self) -> Tensor:
        """Of all data (N, k), as the encoder is now."""
        found = self.model.eval().encode(self.data)
        self.model.train()
        return found

    def save(self, file: Path, history: list[Epoch]) -> None:
        """All that the training must remember."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"penalty.{name}": value for name, value in self.penalty.state_dict().items()}
        for name, adam in self.optimisers():
            for place, memory in adam.state_dict()["state"].items():
                tensors |= {f"{name}.{place}.{key}": value for key, value in memory.items()}
        words = {"training": self.words, "history": json.dumps([asdict(epoch) for epoch in history])}
        with new_file(file) as place:
            save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, place, words)

    def load(self, file: Path) -> list[Epoch]:
        """Takes up what ``save`` wrote, if it did."""
        if not file.exists():
            return []
        try:
            with safe_open(str(file), "pt") as opened:
                words = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file} cannot be read: {error}; delete it to train anew") from error
        if words.get("training") != self.words:
            raise InputError(f"{file} is the state of another training; name another file, or delete it to train anew")
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "penalty": {}}
        for name, value in tensors.items():
            room, _, rest = name.partition(".")
            parts.setdefault(room, {})[rest] = value
        self.model.load_state_dict(parts["model"])
        self.penalty.load_state_dict(parts["penalty"])
        for name, adam in self.optimisers():
            memory: dict[int, dict[str, Any]] = {}
            for key, value in parts[name].items():
                place, _, field = key.partition(".")
                memory.setdefault(int(place), {})[field] = value
            adam.load_state_dict({"state": memory, "param_groups": adam.state_dict()["param_groups"]})
        return [Epoch(**epoch) for epoch in json.loads(words["history"])]

    def optimisers(self) -> list[tuple[str, torch.optim.Optimizer]]:
        theirs = self.penalty.optimiser
        return [("adam", self.adam)] + ([] if theirs is None else [("other", theirs)])


def _words(model: Autoencoder, data: Tensor, penalty: Penalty, training: Training) -> str:
    """What a training is, so that the state of another one is not taken for its own."""
    rows = data.flatten(1).numpy()
    content = Fingerprint(rows.shape, rows.dtype)
    content.update(rows)
    settings = {name: value for name, value in vars(penalty).items() if isinstance(value, int | float)}
    for passing in ("training", "share"):  # torch's mode, and what depends on the epoch
        settings.pop(passing, None)
    about = {
        "start": model.fingerprint,
        "training": asdict(training),
        "penalty": [type(penalty).__name__, settings],
        "data": content.hexdigest(),
    }
    return json.dumps(about)
