"""The attacks by name, and how each is built from the models once they are open."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from excise.errors import UsageError
from excise.eval.attack import Attack, EmbeddingAttack
from excise.eval.attack_session import AttackPlan, Session
from excise.eval.closed_form_attack import (
    RADII,
    RIDGE,
    ClosedFormAttack,
    System,
    check_closed_form,
    closed_form_name,
    text_layers,
)
from excise.eval.text_embedder import folder_embedder

if TYPE_CHECKING:
    from excise.eval.attack_concept import ConceptSource
    from excise.eval.clip_encoder import ClipEncoder
    from excise.eval.p4d import P4DSettings, Variant
    from excise.eval.ring_a_bell import RingABellSettings
    from excise.eval.unlearn_diff_atk import UnlearnDiffAtkSettings


def p4d(variant: Variant, settings: P4DSettings, similarity: str) -> AttackPlan:
    """P4D-N or P4D-K.

    Args:
        similarity: the CLIP that says which image is nearest the unedited model's: ``demo:clip`` or a folder.

    Raises:
        ModelError: the folder holds no CLIP, when the attack is built.
    """

    def make(session: Session) -> Sequence[Attack]:
        from excise.eval.attacked_model import AttackedModel
        from excise.eval.case_image import CaseImage, ImageSimilarity
        from excise.eval.p4d import P4D

        nearness = ImageSimilarity(_clip(similarity, session))
        edited, original = AttackedModel(session.torch.pipeline), AttackedModel(session.torch_base.pipeline)
        image = CaseImage(session.attacked, num_inference_steps=session.num_inference_steps)
        return [
            P4D(
                edited,
                original,
                variant,
                target=session.target,
                image=image,
                similarity=nearness,
                settings=settings,
            )
        ]

    return AttackPlan((f"p4d-{variant}",), {**settings.model_dump(mode="json"), "similarity": similarity}, make)


def unlearn_diff_atk(settings: UnlearnDiffAtkSettings) -> AttackPlan:
    """UnlearnDiffAtk; the unedited model's images are all that it needs of that model."""

    def make(session: Session) -> Sequence[Attack]:
        from excise.eval.attacked_model import AttackedModel
        from excise.eval.unlearn_diff_atk import UnlearnDiffAtk

        return [UnlearnDiffAtk(AttackedModel(session.torch.pipeline), session.target, settings)]

    return AttackPlan(("unlearn-diff-atk",), settings.model_dump(mode="json"), make)


def ring_a_bell(source: ConceptSource, settings: RingABellSettings) -> AttackPlan:
    """Ring-A-Bell, which searches with the unedited model's text encoder."""

    def make(session: Session) -> Sequence[Attack]:
        from excise.eval.ring_a_bell import RingABell

        embedder = folder_embedder(Path(session.base.spec.place), device=session.models.device)
        return [RingABell(embedder, source.of(embedder), settings)]

    return AttackPlan(("ring-a-bell",), {**settings.model_dump(mode="json"), **source.settings()}, make)


def ring_a_bell_embedding(source: ConceptSource, eta: float) -> AttackPlan:
    """RECE's variant, with the attacked model's own text encoder.

    Raises:
        UsageError: η isn't finite.
    """
    if not math.isfinite(eta):
        raise UsageError(f"--eta {eta:g}: give a finite number, such as the published 3 for nudity, 0.9 for Van Gogh")

    def make(session: Session) -> Sequence[EmbeddingAttack]:
        from excise.eval.ring_a_bell_embedding import RingABellEmbedding

        embedder = folder_embedder(Path(session.attacked.spec.place), device=session.models.device)
        return [RingABellEmbedding(embedder, source.of(embedder), eta=eta)]

    return AttackPlan(("ring-a-bell-embedding",), {"eta": eta, **source.settings()}, make)


def closed_form(
    *, ridge: float = RIDGE, radii: Sequence[float] = RADII, control: bool = True, seed: int = 0
) -> AttackPlan:
    """Eq. 8's embedding, the best ones of bounded norm, and random ones of eq. 8's norms.

    Raises:
        UsageError: a ridge or radius that isn't positive and finite.
    """
    check_closed_form(ridge, radii)
    variants: list[dict[str, Any]] = [{}, *({"radius": radius} for radius in radii)]
    variants += [{"control": True, "seed": seed}] if control else []

    def make(session: Session) -> Sequence[EmbeddingAttack]:
        runtime = session.torch
        system = System.of(text_layers(session.torch_base.pipeline), text_layers(runtime.pipeline))
        session.base.close()
        return [ClosedFormAttack(system, runtime.encode, ridge=ridge, **variant) for variant in variants]

    names = tuple(
        closed_form_name(variant.get("radius"), control=variant.get("control", False)) for variant in variants
    )
    return AttackPlan(names, {"ridge": ridge, "radii": list(radii), "control": control}, make)


def _clip(place: str, session: Session) -> ClipEncoder:
    from excise.demo import CLIP
    from excise.eval.clip_encoder import ClipEncoder
    from excise.eval.protocol_models import DEMO_CLIP

    folder = CLIP if place == DEMO_CLIP else Path(place)
    return ClipEncoder(folder, name=place, device=session.models.device)
