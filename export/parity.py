"""How far an exported model is from the PyTorch model, measured against how far the edit moved it.

    relative = ‖exported − edited‖ / ‖edited − base‖

0 is exact. 1 is what an export that lost the edit scores, so a figure near 1 is caught whatever the edit's size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise.errors import ArtefactError, MissingExtra
from excise.export.quiet import quiet

TIMESTEPS = (801, 401, 21)
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


@dataclass(frozen=True)
class DenoiserInputs:
    """What denoisers are compared on.

    Attributes:
        sample: Latents, shape (n, channels, height, width); Flux's, packed, have (n, places, channels).
        timesteps: Each is run with the whole batch.
        encoder_hidden_states: Text states, shape (n, t, d).
        others: What else the denoiser reads, by its input's name; n rows each, except those of ``ONE_FOR_ALL``.
        latents: Name of the input that takes ``sample``.
    """

    sample: NDArray[np.float32]
    timesteps: tuple[float, ...]
    encoder_hidden_states: NDArray[np.float32]
    others: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    latents: str = "sample"

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Every input by its name, but the timestep."""
        return {self.latents: self.sample, "encoder_hidden_states": self.encoder_hidden_states, **self.others}


#: Inputs with a row for each token or place, whatever the batch.
ONE_FOR_ALL = ("txt_ids", "img_ids")


def random_latents(seed: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal latents."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def torch_outputs(denoiser: Any, inputs: DenoiserInputs) -> NDArray[np.float32]:
    """A torch denoiser's outputs, shape (timesteps, *the sample's)."""
    import torch

    arguments: dict[str, Any] = {name: torch.from_numpy(array) for name, array in inputs.arrays().items()}
    if "time_ids" in arguments:
        arguments["added_cond_kwargs"] = {name: arguments.pop(name) for name in ("text_embeds", "time_ids")}
    outputs = []
    with torch.no_grad(), quiet():
        for step in inputs.timesteps:
            timestep = torch.full((len(inputs.sample),), float(step))
            outputs.append(denoiser(timestep=timestep, **arguments, return_dict=False)[0])
    result: NDArray[np.float32] = torch.stack(outputs).float().numpy()
    return result


def onnx_outputs(path: Path, inputs: DenoiserInputs) -> NDArray[np.float32]:
    """An ONNX denoiser's outputs on ONNX Runtime's CPU provider, shape (timesteps, *the sample's).

    A model with a fixed batch is run as often as the rows need. The provider computes float16 in float32.

    Raises:
        ArtefactError: The file can't be loaded or run, or it has other inputs than these.
        MissingExtra: onnxruntime isn't installed.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingExtra("onnxruntime", "export") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        outputs = [_run(session, inputs, step) for step in inputs.timesteps]
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ArtefactError(f"{path} can't be run as a Stable Diffusion UNet or a transformer: {reason}") from error
    return np.stack(outputs)


def _run(session: Any, inputs: DenoiserInputs, step: float) -> NDArray[np.float32]:
    """The output at one timestep, in the model's own batches; the last one is filled up with copies."""
    declared = {one.name: one for one in session.get_inputs()}
    count, fixed = len(inputs.sample), declared[inputs.latents].shape[0]
    size = fixed if isinstance(fixed, int) else count
    outputs = []
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        feed = {name: array if name in ONE_FOR_ALL else array[rows] for name, array in inputs.arrays().items()}
        feed["timestep"] = np.full((size,) if declared["timestep"].shape else (), step)
        cast = {name: array.astype(_DTYPES[declared[name].type]) for name, array in feed.items()}
        outputs.append(np.asarray(session.run(None, cast)[0], dtype=np.float32)[: count - start])
    return np.concatenate(outputs)
