"""One ONNX model of an exported pipeline in ONNX Runtime: opened, checked and called by the names that it declares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime

from excise.errors import ArtefactError, UsageError
from excise.manifest import NAME, hash_file, verify
from excise.serve.json_object import read_json_object

Provider = Literal["cpu", "cuda", "tensorrt"]

#: each provider with those that take the nodes it can't run
PROVIDERS: Mapping[str, tuple[str, ...]] = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}

DTYPES: Mapping[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


def providers(provider: str) -> list[str]:
    """ONNX Runtime's names for a provider. Raises ``UsageError`` if it is unknown or this build doesn't have it."""
    if provider not in PROVIDERS:
        raise UsageError(f"unknown provider {provider!r}: choose one of {', '.join(PROVIDERS)}")
    available = onnxruntime.get_available_providers()
    wanted = PROVIDERS[provider]
    if wanted[0] not in available:
        usable = ", ".join(name for name, chain in PROVIDERS.items() if chain[0] in available)
        raise UsageError(
            f"this onnxruntime has no {wanted[0]}, only {', '.join(available)}: "
            f"pip install 'excise[gpu]', or take provider {usable}"
        )
    return [name for name in wanted if name in available]


def one_line(error: Exception) -> str:
    """An error's text on one line."""
    return " ".join(str(error).split())


class OnnxComponent:
    """``folder/name/model.onnx`` with its ``config.json``.

    ``inputs`` are the names that it has to declare, no more and no fewer but those of ``optional``, and ``output`` is
    the one that is read; ``outputs`` are all that it has, with the declared sizes of their last dimensions.
    ``provider_options`` are those of each provider by ONNX Runtime's name for it. ``initializers`` take the place of
    initialisers of the same names in external data, in memory alone.
    Raises ``ArtefactError`` if a file is missing or can't be loaded, or the names are others, and ``UsageError`` if
    the provider can't be used.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        inputs: Iterable[str],
        optional: Iterable[str] = (),
        output: str,
        provider: Provider,
        threads: int | None,
        provider_options: Mapping[str, Mapping[str, str]] | None = None,
        initializers: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> None:
        self.name, self.output = name, output
        self.file = folder / name / "model.onnx"
        self.config = read_config(folder, name)
        chain = providers(provider)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only: they come back as exceptions
        if threads is not None:
            options.intra_op_num_threads = threads
        given = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in (initializers or {}).items()}
        try:
            if given:
                options.add_external_initializers(list(given), list(given.values()))
            # its own fallback would print to stdout and go on with another provider
            self._session = onnxruntime.InferenceSession(
                str(self.file),
                options,
                providers=[(one, dict((provider_options or {}).get(one, {}))) for one in chain],
                enable_fallback=0,
            )
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise ArtefactError(f"{self.file} can't be loaded: {one_line(error)}") from error
        if self._session.get_providers()[0] != chain[0]:
            raise UsageError(
                f"{chain[0]} can't start on this machine: check its driver and libraries, or take provider cpu"
            )
        self._inputs = {node.name: node for node in self._session.get_inputs()}
        self.outputs: dict[str, int | None] = {
            node.name: node.shape[-1] if node.shape and isinstance(node.shape[-1], int) else None
            for node in self._session.get_outputs()
        }
        expected = sorted(inputs)
        if sorted(self._inputs.keys() - set(optional)) != expected:
            raise ArtefactError(
                f"{self.file} takes {', '.join(sorted(self._inputs))}; a Stable Diffusion pipeline's, with the text "
                f"encoders of this folder, takes {', '.join(expected)}"
            )
        for node in self._inputs.values():
            if node.type not in DTYPES:
                raise ArtefactError(f"{self.file}: {node.name} is a {node.type}, supported are {', '.join(DTYPES)}")
        if output not in self.outputs:
            raise ArtefactError(f"{self.file} has no output {output!r}, only {', '.join(self.outputs)}")

    def takes(self, name: str) -> bool:
        """Whether it declares an input of that name."""
        return name in self._inputs

    def rank(self, name: str) -> int:
        """The declared number of dimensions of an input."""
        return len(self._inputs[name].shape)

    def width(self, name: str, axis: int) -> int | None:
        """The declared size of one dimension of an input; ``None`` where it is free."""
        size = self._inputs[name].shape[axis]
        return size if isinstance(size, int) else None

    def __call__(self, **values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """The output as float32, of inputs by their names, each cast to the type that the model declares.

        Raises ``ArtefactError`` if a value doesn't fit its type or ONNX Runtime can't run the model.
        """
        return self.run([self.output], **values)[0]

    def run(self, outputs: Sequence[str], **values: npt.NDArray[Any]) -> list[npt.NDArray[np.float32]]:
        """These of its outputs; otherwise as a call."""
        feed = {name: self._cast(name, value) for name, value in values.items()}
        try:
            results = self._session.run(list(outputs), feed)
        except Exception as error:
            raise ArtefactError(f"{self.file} failed: {one_line(error)}") from error
        return [np.asarray(result, np.float32) for result in results]

    def _cast(self, name: str, value: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A value in the declared type of an input. A fraction in place of an integer is an error: it would be cut."""
        dtype = DTYPES[self._inputs[name].type]
        if issubclass(dtype, np.integer) and (value % 1 != 0).any():
            raise ArtefactError(
                f"{self.file} takes an integer {name}, not {value.flat[0]}: export it with a float one, "
                "or take a scheduler with timestep_spacing leading"
            )
        return np.asarray(value, dtype)


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """The ``config.json`` of a component.

    Raises ``ArtefactError`` if the component isn't whole, naming what is missing.
    """
    if not folder.is_dir():
        raise ArtefactError(f"{folder} isn't a folder: give the one that an export wrote")
    for file in (folder / name / "model.onnx", folder / name / "config.json"):
        if not file.is_file():
            raise ArtefactError(f"{folder} has no {name}/{file.name}: export the model to ONNX again")
    return read_json_object(folder / name / "config.json")


def engine_key(folder: Path) -> str | None:
    """What tells this folder's engines from all others': the hash of its manifest, None where there is none.

    Raises ``ArtefactError`` if the files aren't as the manifest says: an engine of other weights would be taken.
    """
    manifest = folder / NAME
    if not manifest.is_file():
        return None
    if problems := verify(folder):
        raise ArtefactError(f"{folder} isn't as its manifest says, and engines are kept by that: {problems[0]}")
    return hash_file(manifest)
