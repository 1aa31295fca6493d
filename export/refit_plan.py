"""Put another edit into an engine: every weight that an edit can move, each time, in one order.

All of them, because an engine that is refitted from A to B and back to A with fewer keeps traces of B
(https://github.com/NVIDIA/TensorRT/issues/3628).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise.enginefile import RefitEntry
from excise.errors import ArtefactError, NumericsError, UsageError
from excise.export.engine_library import EngineLibrary, Heard


@dataclass(frozen=True)
class RefitWeight:
    """One weight of the engine: its name in the refitter, and its new values in C order."""

    name: str
    values: NDArray[Any]


@dataclass(frozen=True)
class RefitPlan:
    """Every refittable weight of an engine with its new values, by name in the engine."""

    weights: tuple[RefitWeight, ...]


def refit_plan(refittable: Mapping[str, RefitEntry], arrays: Mapping[str, NDArray[Any]]) -> RefitPlan:
    """Check that ``arrays`` are what the engine's refit replaces, no more and no less.

    Args:
        refittable: Of the engine's entry, by torch name.
        arrays: Values by torch name, in the initialisers' shapes (d × o where they are transposed) and dtypes, as
            ``excise.edited_initializers`` gives them. Kept as they are, not copied.

    Raises:
        UsageError: The engine can't be refitted, or a name is missing or unknown, or a shape, dtype or order in memory
            is another.
        NumericsError: A value isn't finite.
    """
    if not refittable:
        raise UsageError("this engine can't be refitted: build it with refit: true, on a machine with a GPU")
    if missing := sorted(set(refittable) - set(arrays)):
        raise UsageError(f"a refit needs all of its {len(refittable)} weights, and {missing[0]} is missing")
    if unknown := sorted(set(arrays) - set(refittable)):
        raise UsageError(f"{unknown[0]} isn't a refittable weight of this engine: build it anew for this edit")
    for name, place in refittable.items():
        _check_array(name, place, arrays[name])
    chosen = sorted(refittable.items(), key=lambda item: item[1].engine_weight)
    return RefitPlan(tuple(RefitWeight(place.engine_weight, arrays[name]) for name, place in chosen))


def _check_array(name: str, place: RefitEntry, values: NDArray[Any]) -> None:
    if values.shape != place.shape:
        raise UsageError(f"{name} has shape {values.shape}, and the engine's has {place.shape}: take its own export")
    if values.dtype != np.dtype(place.dtype):
        raise UsageError(f"{name} is {values.dtype}, and the engine's is {place.dtype}: cast it to that")
    if not values.flags.c_contiguous:
        raise UsageError(f"{name} isn't contiguous in memory: pass numpy.ascontiguousarray of it")
    if not np.isfinite(values).all():
        raise NumericsError(f"{name} isn't finite: the engine would give no images; make the edit anew")


def execute(plan: RefitPlan, engine: Any, library: EngineLibrary) -> None:
    """Refit a deserialised engine that no context is running.

    Raises:
        ArtefactError: The engine has other refittable weights than the plan, asks for more, or the refit fails. The
            engine isn't to be used then.
    """
    module = library.module
    with library.listening() as heard:
        refitter = module.Refitter(engine, library.logger)
        _check_names(plan, set(refitter.get_all_weights()))
        for weight in plan.weights:
            if not refitter.set_named_weights(weight.name, module.Weights(weight.values)):
                raise _failed(library, f"{weight.name} was refused", heard)
        if missing := sorted(refitter.get_missing_weights()):
            raise ArtefactError(f"the refit failed: the engine also asks for {missing[0]}; build it again")
        if not refitter.refit_cuda_engine():
            raise _failed(library, "the engine wasn't refitted", heard)


def _check_names(plan: RefitPlan, there: set[str]) -> None:
    planned = {weight.name for weight in plan.weights}
    if other := sorted(planned ^ there):
        where = "in the plan alone" if other[0] in planned else "in the engine alone"
        raise ArtefactError(
            f"the refit failed: {other[0]} is {where}; the engine isn't the one that its JSON describes"
        )


def _failed(library: EngineLibrary, what: str, heard: Heard) -> ArtefactError:
    return ArtefactError(f"the refit failed: {library.failure(what, heard)}")
