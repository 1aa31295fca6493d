"""From a recipe to an edit: read the folder, embed the prompts, solve stream by stream, and describe what was done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

import excise
from excise.edit.apply import carried
from excise.edit.auto_epochs import Probe, check_measured, detection_of, stop_rule
from excise.edit.cache import CachedEncoder, EmbeddingCache
from excise.edit.component_files import Float32
from excise.edit.embedded_prompts import EmbeddedPrompts
from excise.edit.methods import METHODS
from excise.edit.model_folder import read_sites
from excise.edit.parameters import TRAINED
from excise.edit.problem import Problem, Stage
from excise.edit.recipe import Recipe
from excise.edit.site_selection import selection
from excise.edit.stream_arrays import stream_arrays
from excise.edit.text import Embedding, load_encoder, text_fingerprint, text_settings, text_stamp
from excise.editfile import Edit, fingerprint
from excise.editmetadata import Certified, EditMetadata, Erased, Kept, StageFigures, Stream
from excise.errors import UsageError


def erase(
    folder: Path,
    recipe: Recipe,
    *,
    device: str = "cpu",
    certificate: bool = True,
    cache: EmbeddingCache | None = None,
    probe: Probe | None = None,
    checkpoints: Path | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Edit:
    """Erase concepts from a diffusers folder.

    A closed form reads the text encoders and the layers that read them only. A trained method reads the whole UNet,
    and neither certifies nor caches embeddings.

    Args:
        folder: a diffusers folder.
        recipe: resolved.
        device: where embeddings are computed and the systems solved; the edit's arrays are NumPy's all the same.
        certificate: measure how well any bounded embedding regenerates each concept, and store it in the edit.
        cache: where embeddings outlive the process; None keeps none.
        probe: judges RECE's epochs by pictures, and decides how many where the recipe says ``auto``.
        checkpoints: the folder from which a trained method resumes, and where it keeps what that takes; None keeps
            nothing. Closed forms have none.
        progress: told each step.

    Raises:
        UsageError: a recipe that can't be used with this model, a prompt over the token limit, an unknown device.
        ModelError: a folder that is missing, incomplete, of an unknown family (NoCrossAttention: nothing to edit) or
            written to meanwhile.
        NumericsError: the solve has no finite answer, or the loss of a training isn't finite.
        OutputError: ``checkpoints`` holds something else or can't be written.
    """
    pairs = recipe.pairs()
    if not pairs:
        raise UsageError("nothing to erase: give --erase TEXT, or a preset or recipe that names its concepts")
    if recipe.method in TRAINED:
        _check_device(device)
        from excise.edit.trained_methods import train

        return train(folder, recipe, device=device, checkpoints=checkpoints, progress=progress)
    method, automatic = METHODS[recipe.method], (recipe.method, recipe.epochs) == ("rece", "auto")
    if automatic:
        check_measured(certificate)
    _check_device(device)
    progress("reading the layers that read text")
    sites = read_sites(folder, select=selection(recipe, folder, values_only=method.values_only))
    progress("embedding the prompts")
    stamp = text_stamp(folder, sites.family)
    encoder = CachedEncoder(
        lambda: load_encoder(folder, sites.family, device=device),
        text_fingerprint(folder, sites.family),
        cache or EmbeddingCache(None),
        lambda tokens, length, start: Embedding(torch.from_numpy(tokens).double(), length, start),
        settings=text_settings(folder, sites.family),
        unchanged=lambda: text_stamp(folder, sites.family) == stamp,
    )
    prompts = EmbeddedPrompts(encoder, pairs, lambda: recipe.kept(pairs))
    dims = {stream: next(iter(weights.values())).shape[1] for stream, weights in sites.streams.items()}
    grams, number_kept = prompts.kept_grams()
    solved: dict[str, tuple[Stage, ...]] = {}
    named: dict[str, tuple[tuple[str, int], ...]] = {}
    for stream, weights in sites.streams.items():
        progress(f"solving {recipe.method} for {len(weights)} weights, {dims[stream]} wide")
        named[stream], tokens = prompts.certified(stream) if certificate else ((), torch.zeros(0, dims[stream]))
        problem = Problem(
            weights=[weight.to(device) for weight in weights.values()],
            concepts=lambda stream=stream: prompts.concepts(stream),  # type: ignore[misc]
            kept=lambda stream=stream: prompts.kept(stream),  # type: ignore[misc]
            kept_gram=grams.get(stream, torch.zeros(dims[stream], dims[stream], dtype=torch.float64)).to(device),
            kept_scale=recipe.keep_weight(number_kept),
            null=lambda stream=stream: prompts.null(stream).to(device),  # type: ignore[misc]
            certified=tokens.to(device),
        )
        solved[stream] = method.solve(problem, recipe, probe)
    results = {stream: [stage for stage in stages if stage.accepted][-1] for stream, stages in solved.items()}
    judged = any(stage.detected is not None for stages in solved.values() for stage in stages)
    metadata = EditMetadata(
        excise_version=excise.__version__,
        method=recipe.method,
        preset=recipe.preset,
        recipe=recipe.model_dump(mode="json", exclude={"erase", "to", "keep"}),
        concepts=tuple(Erased(erase=concept, to=target) for concept, target in pairs),
        kept=Kept.of(recipe.kept(pairs)),
        token_rule=recipe.rule,
        family=sites.family.name,
        component=sites.family.component,
        streams=tuple(
            Stream(name=stream, dim=dims[stream], sites=tuple(weights)) for stream, weights in sites.streams.items()
        ),
        weights_fingerprint=fingerprint(
            Float32({name: weight for weights in sites.streams.values() for name, weight in weights.items()})
        ),
        text_encoder_fingerprint=encoder.fingerprint,
        on=carried(folder),
        stages=tuple(figure for stream, stages in solved.items() for figure in _figures(stream, stages)),
        certificate=tuple(
            entry for stream, stages in solved.items() for entry in _certificate(stream, stages, named[stream])
        ),
        detection=None if probe is None or not judged else detection_of(probe, [concept for concept, _ in pairs]),
        stop_rule=stop_rule(probe) if automatic else None,
    )
    tensors = {}
    for stream, stage in results.items():
        tensors.update(stream_arrays(stage.transform, stream))
    return Edit(metadata, tensors)


def _check_device(device: str) -> None:
    try:
        # MPS has no float64, and "meta" no numbers.
        float(torch.zeros(1, dtype=torch.float64, device=device))
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise UsageError(
            f"--device {device} can't be used ({reason}): use cpu, or install a torch that has it"
        ) from None


def _figures(stream: str, stages: tuple[Stage, ...]) -> list[StageFigures]:
    """The curve over a method's stages."""
    return [
        StageFigures(
            stage=stage.name,
            stream=stream,
            residual=stage.residual,
            margin=None if stage.margin is None else float(stage.margin.total[0]),
            moved=stage.moved,
            detected=stage.detected,
            detected_after=stage.detected_after,
            accepted=stage.accepted,
        )
        for stage in stages
    ]


def _certificate(stream: str, stages: tuple[Stage, ...], named: tuple[tuple[str, int], ...]) -> list[Certified]:
    """Each stage's margins, concept by concept. The unedited model has none: the concept itself attains 0."""
    entries = []
    for stage in stages:
        if stage.margin is None:
            continue
        start = 0
        for concept, count in named:
            margin = stage.margin.part(slice(start, start + count))
            start += count
            entries.append(
                Certified(
                    stage=stage.name,
                    stream=stream,
                    concept=concept,
                    radii=margin.radii,
                    errors=tuple(margin.total.tolist()),
                    weakest=tuple(margin.worst.tolist()),
                    tokens=tuple(tuple(row) for row in margin.errors.tolist()) if count > 1 else (),
                )
            )
    return entries
