"""Options of an engine's build, as a YAML file gives them, and their check against an ONNX file's inputs.

images: {min: 1, opt: 1, max: 4}          # of a pipeline: how many at a time
compute_capabilities: [SM89, SM120]       # tensorrt_rtx only
refit: true                               # needs a GPU
profiles:                                 # of a pipeline: in place of those that images gives
  unet:
    - sample: {min: [2, 4, 64, 64], opt: [2, 4, 64, 64], max: [8, 4, 96, 96]}
      encoder_hidden_states: {min: [2, 77, 768], opt: [2, 77, 768], max: [8, 77, 768]}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, model_validator

from excise.enginefile import Range, Size, TensorEntry
from excise.errors import MissingExtra, UsageError
from excise.manifest import first_problem

Profile = dict[str, Range]
M = TypeVar("M", bound=BaseModel)


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BuildOptions(_Model):
    """What every engine of a pipeline is built with.

    Attributes:
        compute_capabilities: GPUs that a tensorrt_rtx engine is for, such as ``SM89``; by default what the library
            takes as portable (Ampere and later). Empty for tensorrt, which builds for the GPU that it runs on.
        refit: Whether the weights that an edit can move can be replaced in the engine. Needs a GPU.
        tf32: Whether float32 products may run in TF32 where the GPU has it; the libraries' own default.
        optimization_level: From 0 (a quick build) to 5 (a quick engine).
        workspace_mib: The most device memory that a layer may use beside its tensors; by default all of it.
        timing_cache: A file that tensorrt keeps measured kernels in, read and replaced; tensorrt_rtx has none.
    """

    compute_capabilities: tuple[Annotated[str, Field(pattern="^SM[0-9]{2,3}$")], ...] = ()
    refit: StrictBool = False
    tf32: StrictBool = True
    optimization_level: Annotated[int, Field(strict=True, ge=0, le=5)] = 3
    workspace_mib: Size | None = None
    timing_cache: Path | None = None


class EngineOptions(BuildOptions):
    """Options of one engine: ``profiles`` give each input with a free shape its range; none for static inputs."""

    profiles: tuple[Profile, ...] = ()


class Images(_Model):
    """How many images a pipeline's engines make at a time."""

    min: Size = 1
    opt: Size = 1
    max: Size = 4

    @model_validator(mode="after")
    def _ordered(self) -> Images:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"isn't min <= opt <= max: {self.min}, {self.opt}, {self.max}")
        return self


class PipelineOptions(BuildOptions):
    """Options of a pipeline's engines; ``profiles`` of a component take the place of those that ``images`` gives."""

    images: Images = Images()
    profiles: dict[str, tuple[Profile, ...]] = {}

    def of_engine(self, profiles: tuple[Profile, ...], *, refit: bool) -> EngineOptions:
        """The options of one of the engines."""
        shared = {name: getattr(self, name) for name in BuildOptions.model_fields}
        return EngineOptions(**{**shared, "refit": refit, "profiles": profiles})


def read_options(path: Path, model: type[M]) -> M:
    """Options from a YAML file; an empty one gives the defaults.

    Raises:
        UsageError: The file is missing, isn't YAML, or has a field that is unknown or can't be used.
        MissingExtra: PyYAML isn't installed.
    """
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise MissingExtra("PyYAML", "export") from error
    try:
        raw: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path} doesn't exist: name a file of engine options") from error
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} isn't YAML: {' '.join(str(error).split())}") from error
    if raw is not None and not isinstance(raw, dict):
        raise UsageError(f"{path} isn't a file of engine options: write fields, one a line, such as refit: true")
    try:
        return model.model_validate(raw or {})
    except ValidationError as error:
        raise UsageError(f"{path}: {first_problem(error)}") from error


def check_profiles(onnx: Path, inputs: Mapping[str, TensorEntry], profiles: tuple[Profile, ...]) -> None:
    """Raise ``UsageError`` unless every profile gives every free input of the ONNX file a range that fits its shape."""
    free = [name for name, tensor in inputs.items() if -1 in tensor.shape]
    if free and not profiles:
        raise UsageError(f"{onnx} has free shapes ({_shown(free[0], inputs)}): give a profile with min, opt and max")
    for number, profile in enumerate(profiles):
        where = f"profile {number} of {onnx}"
        if unknown := [name for name in profile if name not in inputs]:
            raise UsageError(f"{where} has {unknown[0]}, which isn't an input: these are {', '.join(inputs)}")
        if missing := [name for name in free if name not in profile]:
            raise UsageError(f"{where} lacks {_shown(missing[0], inputs)}: give its min, opt and max")
        for name, shapes in profile.items():
            _check_range(where, name, inputs, shapes)


def _check_range(where: str, name: str, inputs: Mapping[str, TensorEntry], shapes: Range) -> None:
    shape = inputs[name].shape
    if len(shapes.min) != len(shape):
        raise UsageError(f"{where} gives {_shown(name, inputs)} {len(shapes.min)} dimensions, not {len(shape)}")
    for axis, fixed in enumerate(shape):
        if fixed != -1 and not shapes.min[axis] == shapes.max[axis] == fixed:
            given = f"{shapes.min[axis]} to {shapes.max[axis]}"
            raise UsageError(f"{where} gives dimension {axis} of {_shown(name, inputs)} {given}: it is {fixed}")


def _shown(name: str, inputs: Mapping[str, TensorEntry]) -> str:
    return f"{name} [{', '.join('?' if size == -1 else str(size) for size in inputs[name].shape)}]"
