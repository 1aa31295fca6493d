"""Training that can be stopped and resumed: atomic checkpoints, seeded batches, a loop with progress and a deadline."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that ``path`` holds either the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load(path: Path) -> dict[str, Any] | None:
    """The checkpoint at ``path`` (weights-only unpickling), or None when there is none."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def cosine(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, then a cosine to 1 % of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Training:
    """One resumable training run.

    Each step's random draws come from ``seed + step``, so that a resumed run continues as the uninterrupted one would.
    """

    def __init__(
        self,
        name: str,
        modules: dict[str, torch.nn.Module],
        optimizer: torch.optim.Optimizer,
        *,
        checkpoint: Path,
        steps: int,
        warmup: int = 100,
        save_every: float = 120.0,
    ) -> None:
        self.name, self.modules, self.optimizer = name, modules, optimizer
        self.checkpoint, self.steps, self.save_every = checkpoint, steps, save_every
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.warmup = warmup
        self.step = 0
        state = load(checkpoint)
        if state is not None:
            for key, module in modules.items():
                module.load_state_dict(state[key])
            optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def _save(self) -> None:
        state = {key: module.state_dict() for key, module in self.modules.items()}
        save(self.checkpoint, {**state, "optimizer": self.optimizer.state_dict(), "step": self.step})

    def run(
        self, loss_of_step: Callable[[int], tuple[torch.Tensor, dict[str, float]]], after: Callable[[], None]
    ) -> None:
        """Run to the end: ``loss_of_step(step)`` gives the loss and figures to show; ``after()`` follows each step."""
        saved = time.monotonic()
        shown: dict[str, float] = {}
        with tqdm(total=self.steps, initial=self.step, desc=self.name, mininterval=5) as bar:
            while self.step < self.steps:
                factor = cosine(self.step, self.steps, self.warmup)
                for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                    group["lr"] = peak * factor
                loss, figures = loss_of_step(self.step)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                for module in self.modules.values():
                    torch.nn.utils.clip_grad_norm_([p for p in module.parameters() if p.grad is not None], 1.0)
                self.optimizer.step()
                after()
                for key, value in figures.items():
                    shown[key] = value if key not in shown else 0.98 * shown[key] + 0.02 * value
                self.step += 1
                bar.update()
                bar.set_postfix({key: f"{value:.4f}" for key, value in shown.items()}, refresh=False)
                if time.monotonic() - saved > self.save_every:
                    self._save()
                    saved = time.monotonic()
        self._save()


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Index batches over ``count`` items, reshuffled every pass, without end."""
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]
