"""The methods that train, by name, and the run of one: from a recipe to an edit of weight deltas.

Each method's losses are pure functions in a file of its own. Here they meet their weights, their optimiser, the prompts
and images that they train on, and the loop of ``excise.edit.training``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from excise.edit.ca import ca_step, ca_weights
from excise.edit.component_files import Float32
from excise.edit.denoiser import Denoiser, load_unet
from excise.edit.drawn_images import drawn_images
from excise.edit.esd import esd_step, esd_weights
from excise.edit.families import family_of
from excise.edit.model_folder import denoiser_weights
from excise.edit.parameters import PARAMETERS, CaParameters, EsdParameters, SaParameters, TrainingParameters
from excise.edit.presets import COMMAND_LINE
from excise.edit.recipe import Recipe, Sites
from excise.edit.sa import fisher_information, sa_step, sa_weights
from excise.edit.text import Encoder, load_encoder, text_fingerprint
from excise.edit.training import fit
from excise.edit.training_folder import TrainingFolder
from excise.edit.weight_deltas import delta_edit, weight_deltas
from excise.editfile import Edit, fingerprint
from excise.editmetadata import Erased, Kept
from excise.errors import ExciseError, NoCrossAttention, UsageError
from excise.printable import short

#: Images between two checkpoints of the Fisher information.
_FISHER_EVERY = 20

#: Prompts whose embeddings are held: 60 MB of Stable Diffusion 1's.
_HELD = 256


class Prompts:
    """Text embeddings on a device, one prompt at a time: a batch's sums could depend on what else is in it."""

    def __init__(self, encoder: Encoder, device: torch.device) -> None:
        self._encoder, self._device = encoder, device
        self._recent: dict[str, Tensor] = {}

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings with shape (n, t, d), float32.

        Raises:
            PromptTooLong: a prompt has more tokens than the text encoder reads.
        """
        return torch.cat([self._one(prompt) for prompt in prompts])

    def _one(self, prompt: str) -> Tensor:
        if prompt not in self._recent:
            if len(self._recent) >= _HELD:
                del self._recent[next(iter(self._recent))]
            (embedded,) = self._encoder.embed([prompt])
            self._recent[prompt] = embedded["text"][0].tokens.to(torch.float32)[None].to(self._device)
        return self._recent[prompt]


@dataclass(frozen=True)
class Run:
    """What a method trains with.

    Attributes:
        denoiser: the model.
        prompts: embeds.
        pairs: concepts and targets.
        kept: prompts to replay.
        figures: of the method's own class.
        folder: where images are kept.
        progress: told each step.
    """

    denoiser: Denoiser
    prompts: Prompts
    pairs: tuple[tuple[str, str], ...]
    kept: tuple[str, ...]
    figures: TrainingParameters
    folder: TrainingFolder | None
    progress: Callable[[str], None]

    def images(self, name: str, texts: Sequence[str], count: int) -> Tensor:
        """Images of ``texts``, one after the other and over again, with shape (count, c, h, w)."""
        self.progress(f"drawing {count} {name} images with the original model")
        return drawn_images(
            self.denoiser, self.states(texts), self.prompts([""]), count, self.figures, name=name, folder=self.folder
        )

    def states(self, texts: Sequence[str]) -> Callable[[Sequence[int]], Tensor]:
        """From numbers of images to the embeddings of their prompts."""
        return lambda numbers: self.prompts([texts[number % len(texts)] for number in numbers])


@dataclass(frozen=True)
class Trained:
    """A method that trains.

    Attributes:
        source: authors, where published, equation.
        weights: names of the parameters of a UNet that it trains.
        losses: from a run to the loss of each iteration.
        target: whether a concept needs one, or has none.
        replays: whether it reads the kept prompts.
        weight_decay: AdamW's; None is Adam without.
        max_norm: gradients are clipped to it.
    """

    source: str
    weights: Callable[[Any], tuple[str, ...]]
    losses: Callable[[Run], Callable[[int], Tensor]]
    target: Literal["needed", "none"]
    replays: bool = False
    weight_decay: float | None = None
    max_norm: float | None = None

    def optimizer(self, weights: Mapping[str, torch.nn.Parameter], rate: float) -> torch.optim.Optimizer:
        """The published optimiser."""
        if self.weight_decay is None:
            return torch.optim.Adam(weights.values(), lr=rate)
        return torch.optim.AdamW(weights.values(), lr=rate, weight_decay=self.weight_decay)


def _esd(run: Run) -> Callable[[int], Tensor]:
    figures = run.figures
    assert isinstance(figures, EsdParameters)
    concepts, null = run.prompts([concept for concept, _ in run.pairs]), run.prompts([""])
    return lambda iteration: esd_step(run.denoiser, concepts, null, figures, iteration)


def _ca(run: Run) -> Callable[[int], Tensor]:
    figures = run.figures
    assert isinstance(figures, CaParameters)
    concepts, anchors = [concept for concept, _ in run.pairs], [anchor for _, anchor in run.pairs]
    images = run.images("anchor", anchors, figures.images)
    of_image = [number % len(run.pairs) for number in range(len(images))]
    states = run.prompts(concepts), run.prompts(anchors)
    return lambda iteration: ca_step(run.denoiser, images, *states, of_image, figures, iteration)


def _sa(run: Run) -> Callable[[int], Tensor]:
    figures = run.figures
    assert isinstance(figures, SaParameters)
    concepts, targets = [concept for concept, _ in run.pairs], [target for _, target in run.pairs]
    surrogate = run.images("surrogate", targets, figures.surrogate_images), run.states(concepts)
    replay = run.images("replay", run.kept, figures.replay_images), run.states(run.kept)
    fisher = _fisher(run, figures, *replay)
    return lambda iteration: sa_step(run.denoiser, surrogate, replay, fisher, figures, iteration)


def _fisher(
    run: Run, figures: SaParameters, images: Tensor, states: Callable[[Sequence[int]], Tensor]
) -> Mapping[str, Tensor]:
    """The Fisher information, from where the folder has got to."""
    found = run.folder.read("fisher") if run.folder is not None else None
    fisher, done = ({}, 0) if found is None else (found[0], int(found[1]["images"]))
    run.progress(f"measuring the Fisher information on {len(images)} images")
    sums: Mapping[str, Tensor] = {name: tensor.to(run.denoiser.device) for name, tensor in fisher.items()}
    passes = fisher_information(
        run.denoiser, images, lambda number: states([number]), figures, done=done, fisher=fisher or None
    )
    with tqdm(total=len(images), initial=done, desc="Fisher information", unit="image", delay=2) as bar:
        for number, sums in passes:
            bar.update()
            if run.folder is not None and (number % _FISHER_EVERY == 0 or number == len(images)):
                run.folder.write("fisher", sums, {"images": number})
    return sums


_ESD = "ESD, Gandikota et al., ICCV 2023, arXiv 2303.07345, eq. 7"
_CA = "CA, Kumari et al., ICCV 2023, arXiv 2303.13516, eq. 5"
_SA = "SA, Heng & Soh, NeurIPS 2023, arXiv 2305.10120, eq. 8"

#: By the names that recipes and the command line use.
METHODS: Mapping[str, Trained] = MappingProxyType(
    {
        "esd-x": Trained(_ESD, lambda unet: esd_weights(unet, "esd-x"), _esd, "none"),
        "esd-u": Trained(_ESD, lambda unet: esd_weights(unet, "esd-u"), _esd, "none"),
        "esd-full": Trained(_ESD, lambda unet: esd_weights(unet, "esd-full"), _esd, "none"),
        "ca": Trained(_CA, lambda unet: ca_weights(unet, full=False), _ca, "needed", weight_decay=0.01, max_norm=1.0),
        "ca-full": Trained(
            _CA, lambda unet: ca_weights(unet, full=True), _ca, "needed", weight_decay=0.01, max_norm=1.0
        ),
        "sa": Trained(_SA, lambda unet: sa_weights(unet, held=False), _sa, "needed", replays=True, weight_decay=0.01),
        "sa-u": Trained(_SA, lambda unet: sa_weights(unet, held=True), _sa, "needed", replays=True, weight_decay=0.01),
    }
)


def train(
    folder: Path,
    recipe: Recipe,
    *,
    device: str = "cpu",
    checkpoints: Path | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Edit:
    """Train a Stable Diffusion's UNet by a recipe's method; the edit is what that changes of it.

    Args:
        folder: a diffusers folder; it isn't changed.
        recipe: resolved.
        device: where everything runs, in float32.
        checkpoints: from where the run resumes, and where it keeps what that takes; None keeps nothing.
        progress: told each step.

    Raises:
        UsageError: a recipe that the method can't use, another training's checkpoints, or the memory is full.
        ModelError: the folder is missing, incomplete or damaged, or not a Stable Diffusion 1 or 2 for text alone
            (NoCrossAttention: the method has nothing to train).
        NumericsError: a loss or a weight isn't finite, or nothing moved.
        OutputError: ``checkpoints`` holds something else, or can't be written.
    """
    method, pairs = METHODS[recipe.method], recipe.pairs()
    figures = PARAMETERS[recipe.method].model_validate(recipe.parameters)
    assert isinstance(figures, TrainingParameters)
    _check_recipe(recipe, method, pairs)
    kept = _replayed(recipe, pairs, figures) if method.replays else ()
    progress("reading the UNet")
    unet, scheduler = load_unet(folder, device=device)
    names = method.weights(unet)
    if not names:
        raise NoCrossAttention(f"{folder} has no weights that {recipe.method} trains: use another --method")
    denoiser = Denoiser(unet, scheduler, names)
    family = family_of(folder)
    text = text_fingerprint(folder, family)
    described: dict[str, Any] = {
        "method": recipe.method,
        "preset": recipe.preset,
        "recipe": recipe.model_dump(mode="json", exclude={"erase", "to", "keep"}),
        "concepts": tuple(Erased(erase=c, to="" if method.target == "none" else t) for c, t in pairs),
        "kept": Kept.of(recipe.kept(pairs) if method.replays else ()),
    }
    store = None
    if checkpoints is not None:
        store = TrainingFolder(checkpoints, _identity(described, figures, folder, text))
    try:
        prompts = Prompts(load_encoder(folder, family, device=device), denoiser.device)
        loss_of = method.losses(Run(denoiser, prompts, pairs, kept, figures, store, progress))
        progress(f"training {len(names)} weights by {recipe.method}, {figures.iterations} iterations")
        losses = fit(
            denoiser.trained,
            method.optimizer(denoiser.trained, figures.learning_rate),
            loss_of,
            iterations=figures.iterations,
            folder=store,
            max_norm=method.max_norm,
            description=recipe.method,
            progress=progress,
        )
    except ExciseError:
        if store is not None:
            store.forget_if_empty()
        raise
    deltas = weight_deltas(denoiser.original, denoiser.trained)
    return delta_edit(folder, deltas, **described, text_encoder_fingerprint=text, losses=losses)


def _check_recipe(recipe: Recipe, method: Trained, pairs: Sequence[tuple[str, str]]) -> None:
    """Refuse what the method can't do with the recipe, before a file of the model is opened."""
    name = recipe.method
    if recipe.sites != Sites():
        raise UsageError(f"sites: {name} trains the weights that it was published for, remove projections and layers")
    blank = next((concept for concept, target in pairs if not target.strip()), None)
    if method.target == "needed" and blank is not None:
        raise UsageError(
            f"{name} needs a target for {short(blank)}: give --to TEXT, what is drawn in its place, such as its kind"
        )
    # A preset's target is meant for its own method, and a recipe's may be a preset's written out.
    given = next((target for _, target in pairs if target.strip()), None)
    if method.target == "none" and given is not None and recipe.source("to") is COMMAND_LINE:
        raise UsageError(f"{name} has no target, it moves a concept away from itself: remove --to {short(given)}")


def _replayed(recipe: Recipe, pairs: tuple[tuple[str, str], ...], figures: TrainingParameters) -> tuple[str, ...]:
    """The kept prompts that are replayed: as many as there are images, from the first."""
    assert isinstance(figures, SaParameters)
    kept = tuple(islice((prompt for prompt in recipe.kept(pairs) if prompt.strip()), figures.replay_images))
    if not kept:
        raise UsageError(f"{recipe.method} replays images of what is kept: give --keep TEXT or --keep-file FILE")
    return kept


def _identity(
    described: Mapping[str, Any], figures: TrainingParameters, folder: Path, text_encoder: str
) -> dict[str, Any]:
    """What tells a training from another. More iterations of the same are the same training."""
    recipe = described["recipe"]
    fields = ("preset", "note", "parameters", "erase_files", "keep_files")
    return {
        "method": described["method"],
        "concepts": [[each.erase, each.to] for each in described["concepts"]],
        "kept": described["kept"].sha256,
        "parameters": figures.model_dump(mode="json", by_alias=True, exclude={"iterations"}),
        "recipe": {key: value for key, value in recipe.items() if key not in fields},
        "denoiser": fingerprint(Float32(denoiser_weights(folder))),
        "text_encoder": text_encoder,
    }
