"""How far an exported model is from the PyTorch model, measured against how far the edit moved it.

    relative = ‖exported − edited‖ / ‖edited − base‖

0 is exact. 1 is what an export that lost the edit scores, so a figure near 1 is caught whatever the edit's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise.errors import ArtefactError, MissingExtra, NumericsError
from excise.export.quiet import quiet

TIMESTEPS = (801, 401, 21)


@dataclass(frozen=True)
class Parity:
    """Distances between two implementations of one edited model.

    Attributes:
        relative: ‖exported − edited‖ / ‖edited − base‖, Frobenius.
        max_abs: Largest |exported − edited|.
        edit_relative: ‖edited − base‖ / ‖base‖: the size of the edit itself.
        edit_max_abs: Largest |edited − base|.
    """

    relative: float
    max_abs: float
    edit_relative: float
    edit_max_abs: float

    def dict(self) -> dict[str, float]:
        """The figures by name, for the manifest."""
        return asdict(self)


@dataclass(frozen=True)
class UNetInputs:
    """What the UNets are compared on.

    Attributes:
        sample: Latents, shape (n, channels, height, width).
        timesteps: Each is run with the whole batch.
        encoder_hidden_states: Text states, shape (n, t, d).
    """

    sample: NDArray[np.float32]
    timesteps: tuple[int, ...]
    encoder_hidden_states: NDArray[np.float32]


def parity(base: NDArray[Any], edited: NDArray[Any], exported: NDArray[Any]) -> Parity:
    """Compare outputs of equal shape: UNet outputs, final latents or images; computed in float64.

    Args:
        base: From the unedited PyTorch model.
        edited: From the edited PyTorch model, same inputs.
        exported: From the exported edited model, same inputs.

    Raises:
        NumericsError: Shapes differ, an output isn't finite, or the edit changed nothing, so that there is no scale.
    """
    if not base.shape == edited.shape == exported.shape:
        raise NumericsError(f"parity needs equal shapes: {base.shape}, {edited.shape} and {exported.shape}")
    arrays = {"base": base, "edited": edited, "exported": exported}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise NumericsError(f"the {name} model's outputs aren't finite: check it before measuring parity")
    start, target, found = (array.astype(np.float64) for array in arrays.values())
    moved, error = target - start, found - target
    scale = float(np.linalg.norm(moved))
    if scale == 0:
        raise NumericsError("the edit changes none of these outputs: choose prompts that it acts on")
    norm = float(np.linalg.norm(start))
    return Parity(
        relative=float(np.linalg.norm(error)) / scale,
        max_abs=float(np.abs(error).max()),
        edit_relative=scale / norm if norm else 0.0,
        edit_max_abs=float(np.abs(moved).max()),
    )


def make_inputs(
    unet: Any, encoder_hidden_states: NDArray[Any], *, seed: int = 0, timesteps: Sequence[int] = TIMESTEPS
) -> UNetInputs:
    """Seeded normal latents of the UNet's own size, one for each text state (n, t, d)."""
    side = unet.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    shape = (len(encoder_hidden_states), unet.config.in_channels, height, width)
    sample = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return UNetInputs(sample, tuple(timesteps), encoder_hidden_states.astype(np.float32))


def text_states(pipe: Any, prompts: Sequence[str]) -> NDArray[np.float32]:
    """The pipeline's own text states of ``prompts``, shape (n, t, d)."""
    with quiet():
        states = pipe.encode_prompt(
            prompt=list(prompts), device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0]
    result: NDArray[np.float32] = states.detach().float().numpy()
    return result


def torch_outputs(unet: Any, inputs: UNetInputs) -> NDArray[np.float32]:
    """A torch UNet's outputs, shape (timesteps, n, channels, height, width)."""
    import torch

    sample, states = torch.from_numpy(inputs.sample), torch.from_numpy(inputs.encoder_hidden_states)
    with torch.no_grad(), quiet():
        outputs = [unet(sample, torch.tensor(float(t)), states, return_dict=False)[0] for t in inputs.timesteps]
    result: NDArray[np.float32] = torch.stack(outputs).float().numpy()
    return result


def onnx_outputs(path: Path, inputs: UNetInputs) -> NDArray[np.float32]:
    """An ONNX UNet's outputs on ONNX Runtime's CPU provider, shape (timesteps, n, channels, height, width).

    Raises:
        ArtefactError: The file can't be loaded or run, or it has other inputs than Stable Diffusion's UNet.
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
        types = {one.name: np.float16 if "float16" in one.type else np.float32 for one in session.get_inputs()}
        integer = any("int64" in one.type for one in session.get_inputs())
        outputs = []
        for step in inputs.timesteps:
            feed: dict[str, NDArray[Any]] = {
                "sample": inputs.sample.astype(types["sample"]),
                "timestep": np.array(step, dtype=np.int64 if integer else types["timestep"]),
                "encoder_hidden_states": inputs.encoder_hidden_states.astype(types["encoder_hidden_states"]),
            }
            outputs.append(np.asarray(session.run(None, feed)[0], dtype=np.float32))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ArtefactError(f"{path} can't be run as a Stable Diffusion UNet: {reason}") from error
    return np.stack(outputs)


def unet_parity(
    base_unet: Any,
    edited_unet: Any,
    onnx_path: Path,
    encoder_hidden_states: NDArray[Any],
    *,
    seed: int = 0,
    timesteps: Sequence[int] = TIMESTEPS,
) -> Parity:
    """Compare an exported edited UNet with the edited torch UNet, relative to what the edit changed.

    Args:
        base_unet: The unedited torch UNet.
        edited_unet: The edited one.
        onnx_path: The exported edited one.
        encoder_hidden_states: Text states of a realistic norm, shape (n, t, d), e.g. from ``text_states``.
        seed: Of the latents.
        timesteps: Run with every text state.

    Raises:
        ArtefactError: The ONNX file can't be run.
        NumericsError: The edit changes none of the outputs, or some aren't finite.
    """
    inputs = make_inputs(edited_unet, encoder_hidden_states, seed=seed, timesteps=timesteps)
    return parity(torch_outputs(base_unet, inputs), torch_outputs(edited_unet, inputs), onnx_outputs(onnx_path, inputs))
