"""Image generation spread over a Ray cluster: the same files as alone, since a shard is computed as a whole somewhere.

Every actor opens the runtime for itself and is given one shard after the other; what it draws is written here, where
the run's folder is locked. The folders that a specification names have to be at the same place on every node.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from excise.errors import ArtefactError, ExciseError, MissingExtra, UsageError
from excise.eval.cases import Case
from excise.eval.image_generation import Generated, GenerationSettings, Plan, Shard, compute, generate
from excise.eval.runtime_spec import RuntimeSpec
from excise.eval.runtimes import open_runtime
from excise.eval.verification_sides import LoadPipeline
from excise.serve.runtime import Runtime


class Worker:
    """An actor's part: the runtime, opened at the first shard, so that what is wrong with it comes back as an error."""

    def __init__(self, spec: RuntimeSpec, load_pipeline: LoadPipeline, num_inference_steps: int) -> None:
        self._spec, self._load_pipeline, self._steps = spec, load_pipeline, num_inference_steps
        self._runtime: Runtime | None = None

    def compute(self, number: int, shard: Shard) -> tuple[int, npt.NDArray[np.uint8], float]:
        """As ``image_generation.compute``, behind the shard's number."""
        try:
            if self._runtime is None:
                self._runtime = open_runtime(self._spec, self._load_pipeline)
            return number, *compute(self._runtime, shard, self._steps)
        except MissingExtra as error:  # its arguments aren't its text, which is what survives the way back
            raise UsageError(f"on a node of the cluster, {error}") from error


def generate_on_ray(
    folder: Path,
    spec: RuntimeSpec,
    cases: Sequence[Case],
    load_pipeline: LoadPipeline,
    settings: GenerationSettings,
    *,
    batch_size: int,
    actors: int | None = None,
    progress: bool = True,
) -> Generated:
    """As ``image_generation.generate``, by several actors. A server's images are asked for from here.

    Args:
        load_pipeline: importable on every node.
        actors: how many; by default one a GPU for a runtime that computes on one, otherwise one a node.

    Raises:
        UsageError, ArtefactError, OutputError: as ``generate``; no GPU in the cluster; an actor that died.
        MissingExtra: Ray isn't installed.
    """
    if spec.kind in ("triton", "openai"):
        runtime = open_runtime(spec, load_pipeline)
        return generate(folder, spec.name, cases, runtime, settings, batch_size=batch_size, progress=progress)
    plan = Plan(folder, spec.name, cases, settings, batch_size, progress=progress)
    if not plan.incomplete:
        return plan.result()
    with _cluster() as ray, plan.bar(progress) as bar:
        demand = _demand(spec)
        remote = ray.remote(Worker).options(scheduling_strategy="SPREAD", **demand)
        count = min(actors or _devices(ray, spec, demand), len(plan.incomplete))
        started = [remote.remote(_everywhere(spec), load_pipeline, settings.num_inference_steps) for _ in range(count)]
        try:
            pool = ray.util.ActorPool(started)
            tasks = pool.map_unordered(lambda actor, task: actor.compute.remote(*task), enumerate(plan.incomplete))
            for number, images, seconds in tasks:
                shard = plan.incomplete[number]
                plan.store(shard, images, seconds)
                bar.update(plan.missing_of(shard))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ExciseError):
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())[:200]
            raise ArtefactError(
                f"{spec.name}: an actor of the Ray cluster was lost; what is done stays, so start again ({reason})"
            ) from error
        finally:
            for actor in started:
                ray.kill(actor)
    return plan.result()


@contextmanager
def _cluster() -> Iterator[Any]:
    """Ray, connected to the cluster that the process is connected to or ``RAY_ADDRESS`` names, else to one here."""
    # Ray reports its use to its makers otherwise: nothing leaves the machine that the user didn't name
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
        import ray.util
    except ModuleNotFoundError as error:
        raise MissingExtra("ray", "ray") from error
    library: Any = ray
    if library.is_initialized():
        yield library
        return
    try:
        library.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError) as error:
        raise UsageError(f"no Ray cluster can be reached or started: {' '.join(str(error).split())[:200]}") from error
    try:
        yield library
    finally:
        library.shutdown()


def _demand(spec: RuntimeSpec) -> dict[str, float]:
    """What an actor reserves of its node."""
    on_gpu = "cuda" in spec.options.get("device", "") or spec.options.get("provider", "cpu") != "cpu"
    return {"num_cpus": 1, "num_gpus": 1} if on_gpu else {"num_cpus": 1}


def _devices(ray: Any, spec: RuntimeSpec, demand: dict[str, float]) -> int:
    """How many there are in the cluster: GPUs, or nodes."""
    if "num_gpus" not in demand:
        return max(1, sum(bool(node["Alive"]) for node in ray.nodes()))
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if not gpus:
        raise UsageError(f"{spec.name}={spec}: the Ray cluster has no GPU; name one that has, or the processor")
    return gpus


def _everywhere(spec: RuntimeSpec) -> RuntimeSpec:
    """The specification with whole paths, and with this process's number of PyTorch's threads.

    Ray gives an actor as many threads as it reserves processors, and another number rounds otherwise.
    """
    options = dict(spec.options)
    if edit := options.get("edit"):
        options["edit"] = str(Path(edit).absolute())
    if spec.kind == "torch" and "threads" not in options:
        import torch

        options["threads"] = str(torch.get_num_threads())
    return replace(spec, place=str(Path(spec.place).absolute()), options=options)
