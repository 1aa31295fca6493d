"""The closed forms by name.

A method is a pure function in a file of its own, named here with its paper. Each multiplies every weight of a stream
from the right, so that what comes out is a ``Transform``, stage by stage. The methods that train are in
``excise.edit.trained_methods``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from excise.edit.auto_epochs import Probe, choose
from excise.edit.dp import dp
from excise.edit.fitter import Fitter, Scales, orthogonal_to
from excise.edit.leace import leace
from excise.edit.parameters import SpeedParameters
from excise.edit.problem import Problem, Stage
from excise.edit.rece import Rounds
from excise.edit.recipe import Recipe
from excise.edit.speed import speed
from excise.edit.tokens import RULES, Concept
from excise.edit.transform import Step, Transform
from excise.edit.trce1 import trce1

#: From a stream to its edit, stage by stage; the probe judges RECE's epochs by pictures, where there is one.
Solve = Callable[[Problem, Recipe, Probe | None], tuple[Stage, ...]]


@dataclass(frozen=True)
class Method:
    """A closed form.

    Attributes:
        source: authors, where published, equation.
        solve: the last accepted stage is the result.
        values_only: whether the published method leaves K alone.
    """

    source: str
    solve: Solve
    values_only: bool = False


def _rece(problem: Problem, recipe: Recipe, probe: Probe | None) -> tuple[Stage, ...]:
    keeping = Fitter(problem.dim, device=problem.weights[0].device).keep_gram(problem.kept_gram)
    if recipe.sites.conditional_only:
        keeping.hold(problem.null())
    scales = recipe.epoch_scales
    rounds = Rounds(
        problem.weights,
        problem.concepts(),
        keeping,
        uce_scales=Scales(recipe.erase_scale, keep=problem.kept_scale, ridge=recipe.regularization),
        epoch_scales=Scales(scales.erase, keep=scales.keep, ridge=scales.regularization),
        ridge=recipe.ridge,
        technique=recipe.technique,
        anchor=recipe.anchor,
        rule=RULES[recipe.rule],
        gram=lambda: problem.gram,
    )
    return choose(rounds, recipe.epochs if recipe.method == "rece" else 0, problem, probe=probe)


def _peer(solve: Callable[[list[Concept], Problem, Recipe], Transform]) -> Solve:
    """A method of one stage, for concepts that fit in memory."""

    def stages(problem: Problem, recipe: Recipe, probe: Probe | None) -> tuple[Stage, ...]:
        device = problem.weights[0].device
        concepts = (
            replace(concept, tokens=concept.tokens.to(device), target=concept.target.to(device))
            for concept in problem.concepts()
        )
        edit = solve(list(concepts), problem, recipe)
        if recipe.sites.conditional_only:
            edit = _hold(edit, problem)
        return (Stage.of(problem, recipe.method, edit),)

    return stages


def _hold(edit: Transform, problem: Problem) -> Transform:
    """``I + (T − I) N Nᵀ``, with N orthogonal to the tokens of the empty prompt: they don't move.

    Raises ``UsageError`` where they leave no direction: nothing would be erased.
    """
    free = orthogonal_to(problem.null().double())
    matrix = edit.matrix().to(free)
    identity = torch.eye(problem.dim).to(free)
    return Transform((Step.of(identity + (matrix - identity) @ free @ free.T),), problem.dim)


def _speed(concepts: list[Concept], problem: Problem, recipe: Recipe) -> Transform:
    figures = SpeedParameters.model_validate(recipe.parameters)
    return speed(
        concepts,
        problem.kept(),
        null=problem.null(),
        ridge=figures.rho,
        null_ridge=figures.lambda_,
        threshold=figures.null_threshold,
    )


def _dp(concepts: list[Concept], problem: Problem, recipe: Recipe) -> Transform:
    return dp(concepts, problem.kept(), rule=RULES[recipe.rule])


def _trce1(concepts: list[Concept], problem: Problem, recipe: Recipe) -> Transform:
    return trce1(concepts, problem.kept(), erase_scale=recipe.erase_scale, keep_scale=problem.kept_scale)


def _leace(concepts: list[Concept], problem: Problem, recipe: Recipe) -> Transform:
    return leace(concepts, problem.kept())


#: By the names that recipes and the command line use.
METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "rece": Method("RECE, Gong et al., ECCV 2024, arXiv 2407.12383, eq. 3 and 8", _rece),
        "uce": Method("UCE, Gandikota et al., WACV 2024, arXiv 2308.14761, eq. 3", _rece),
        "speed": Method("SPEED, Li et al., ICLR 2026, arXiv 2503.07392", _peer(_speed), values_only=True),
        "dp": Method("Double Projections, CVPR 2026, arXiv 2604.10032", _peer(_dp)),
        "trce1": Method("TRCE, Chen et al., ICCV 2025, arXiv 2503.07389, its first stage", _peer(_trce1)),
        "leace": Method("LEACE, Belrose et al., NeurIPS 2023, arXiv 2306.03819, linear", _peer(_leace)),
    }
)
