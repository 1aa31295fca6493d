"""The networks as other models of the same Triton (business logic scripting), called like ``OnnxComponent``.

They are named ``text_encoder``, ``unet`` and ``vae_decoder`` and have the version number of the pipeline that calls
them. What they take is what the configurations of ``excise.serve.triton_models`` say, read from the same files: the
export that lies in ``onnx`` beside ``model.py``.

Triton allows such calls only while it executes requests: neither at load nor from a thread of the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from excise.enginefile import TensorEntry
from excise.errors import ArtefactError
from excise.manifest import read_manifest
from excise.serve.guidance import CLASSIFIER_FREE
from excise.serve.latent_shape import halvings, latent_shape, positive
from excise.serve.onnx_component import OnnxComponent, read_config
from excise.serve.onnx_runtime import COMPONENTS, OnnxRuntime
from excise.serve.schedulers import read_scheduler
from excise.serve.tokenizer import PromptTokenizer
from excise.serve.triton_options import Backend
from excise.serve.version_folder import network_signature

#: The output that is read of each network.
OUTPUTS: Final[Mapping[str, str]] = {
    "text_encoder": "last_hidden_state",
    "unet": "out_sample",
    "vae_decoder": "sample",
}


class TritonComponent:
    """One model of the same Triton: ``version`` of ``name``.

    ``inputs`` are what its configuration says, with the batch as the first of the dimensions; ``config`` is the
    component's ``config.json``.
    """

    def __init__(
        self, pb_utils: Any, name: str, version: int, inputs: Mapping[str, TensorEntry], config: dict[str, Any]
    ) -> None:
        self._pb_utils, self.name, self.config = pb_utils, name, config
        self._version, self.output = version, OUTPUTS[name]
        self._inputs = {name: (np.dtype(one.dtype), one.shape) for name, one in inputs.items()}

    def takes(self, name: str) -> bool:
        """Whether it declares an input of that name."""
        return name in self._inputs

    def rank(self, name: str) -> int:
        """The declared number of dimensions of an input."""
        return len(self._inputs[name][1])

    def width(self, name: str, axis: int) -> int | None:
        """The declared size of one dimension of an input; ``None`` where it is free."""
        size = self._inputs[name][1][axis]
        return size if size > 0 else None

    def __call__(self, **values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """The output as float32, of inputs by their names, each cast to the type that the model declares.

        Raises ``ArtefactError`` if a value doesn't fit its type, or the model fails.
        """
        pb_utils = self._pb_utils
        request = pb_utils.InferenceRequest(
            model_name=self.name,
            model_version=self._version,
            requested_output_names=[self.output],
            inputs=[pb_utils.Tensor(name, self._cast(name, value)) for name, value in values.items()],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            message = " ".join(response.error().message().split())
            raise ArtefactError(f"the model {self.name} of this server failed: {message}")
        tensor = pb_utils.get_output_tensor_by_name(response, self.output)
        if tensor is None:
            raise ArtefactError(f"the model {self.name} of this server gave no {self.output}")
        return np.asarray(tensor.as_numpy(), np.float32)

    def _cast(self, name: str, value: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if name not in self._inputs:
            raise ArtefactError(f"the model {self.name} of this server has no input {name}: build the repository again")
        dtype = self._inputs[name][0]
        if dtype.kind == "i" and (value % 1 != 0).any():
            raise ArtefactError(f"{self.name} takes an integer {name}, not {value.flat[0]}: export it with a float one")
        return np.ascontiguousarray(value, dtype)


class TritonRuntime(OnnxRuntime):
    """``OnnxRuntime`` whose networks are other models of the same Triton: the loop, its noise and its checks are its.

    Raises ``ArtefactError`` and ``ModelError`` as that does; the edit and the bank are the manifest's.
    """

    def __init__(
        self, folder: Path, pb_utils: Any, version: int, *, networks: Backend = "onnxruntime", batch_size: int = 32
    ) -> None:
        # In place of OnnxRuntime's, which opens ONNX files: every attribute that its methods read is set here.
        self.name, self.folder, self.batch_size, self.guidance = "triton", folder, batch_size, CLASSIFIER_FREE
        self.scheduler = read_scheduler(folder / "scheduler" / "scheduler_config.json")
        manifest = read_manifest(folder)
        self.edit_id = manifest.edit.id if manifest.edit is not None else None
        self.bank = tuple(edit.id if edit is not None else None for edit in manifest.bank) or None

        def component(name: str) -> OnnxComponent:
            inputs = network_signature(folder, name, networks).inputs
            return cast(OnnxComponent, TritonComponent(pb_utils, name, version, inputs, read_config(folder, name)))

        self._text_encoder, self._unet, self._vae_decoder = (component(name) for name in COMPONENTS)
        self.tokenizer = PromptTokenizer(
            folder / "tokenizer", max_length=self._text_encoder.config.get("max_position_embeddings")
        )
        vae = self._vae_decoder.config
        self.latent_shape = latent_shape(self._unet.config, vae)
        self._upscaling = halvings(vae)
        _, height, width = self.latent_shape
        self.image_shape = (height * self._upscaling, width * self._upscaling, 3)
        self._scaling_factor = np.float32(positive(vae, "scaling_factor", 0.18215))
        self._shift_factor = np.float32(vae.get("shift_factor") or 0.0)
