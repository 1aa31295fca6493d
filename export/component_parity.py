"""Every component of an export beside PyTorch's on the same inputs, for each family that excise exports.

An error is measured as ``excise verify`` measures it, ‖B − A‖ / ‖A‖ and, where the edit moves the output,
‖B − A‖ / ‖A − base‖. There is no denoising loop: errors that add up over its steps aren't seen, nor are a tokenizer's
or a scheduler's.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise.editfile import Edit
from excise.errors import ArtefactError, FingerprintMismatch, MissingExtra, NumericsError, UsageError
from excise.export.denoisers import LARGEST, Denoiser, check_exportable, make_inputs
from excise.export.layout import MODEL
from excise.export.parity import TIMESTEPS, DenoiserInputs, onnx_outputs, random_latents, torch_outputs
from excise.export.pipeline import load_pipeline
from excise.export.quiet import quiet
from excise.onnx_metadata import BANK, EDIT_ID, read_metadata

NOT_COMPARED = ("vae_encoder", "tokenizers", "scheduler", "the denoising loop", "images")
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
Array = NDArray[np.float32]
Groups = Mapping[str, Sequence[str]]
#: Outputs by (component, output, group, timestep).
_Outputs = dict[tuple[str, str, str, int | None], Array]


@dataclass(frozen=True)
class ComponentRow:
    """One output of one component.

    Attributes:
        component, output: Their names in the export.
        group: Of the prompts; "latents" for the VAE decoder, which reads no text.
        at: The denoiser's timestep.
        max_abs, relative: Largest |B − A|, and ‖B − A‖ / ‖A‖.
        moved: ‖A − base‖ / ‖A‖: how far the edit moved it.
        to_move: ‖B − A‖ / ‖A − base‖; None where the edit doesn't move it beyond ``max_relative``.
        passed: Whether B is finite and within one of the two tolerances.
    """

    component: str
    output: str
    group: str
    at: int | None
    max_abs: float | None
    relative: float | None
    moved: float
    to_move: float | None
    passed: bool


@dataclass(frozen=True)
class ComponentParity:
    """What was compared, and how it came out.

    Attributes:
        family: The denoiser's.
        rows: Every output.
        not_compared: What the figures say nothing of.
        max_to_move, max_relative: The tolerances.
    """

    family: str
    rows: tuple[ComponentRow, ...]
    not_compared: tuple[str, ...]
    max_to_move: float
    max_relative: float

    @property
    def passed(self) -> bool:
        """Whether every row passed."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    def dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {**asdict(self), "passed": self.passed}


def component_parity(
    reference: Path,
    folder: Path,
    base: Path,
    prompts: Groups,
    *,
    edit: Edit | None = None,
    timesteps: Sequence[int] = TIMESTEPS,
    max_to_move: float,
    max_relative: float,
    progress: Callable[[str], None] = lambda message: None,
) -> ComponentParity:
    """Compare every component of the export in ``folder`` with the torch pipeline ``reference``; one at a time.

    Args:
        reference: A diffusers folder, edited or, with ``edit``, unedited.
        folder: The export.
        base: The unedited diffusers folder, which gives the scale.
        prompts: By group; the edit must move the denoiser on those of ``erased``.
        edit: Applied to ``reference`` in memory.
        timesteps: Of the schedule, for the denoiser.
        max_to_move, max_relative: The tolerances.
        progress: Told each step.

    Raises:
        ModelError: A folder is no pipeline that can be exported.
        UsageError: ``folder`` holds a bank.
        FingerprintMismatch: The edit was made for another model, or ``folder`` carries another one.
        ArtefactError: A component is missing from the export, or can't be run.
        NumericsError: PyTorch's outputs aren't finite, or the edit moves nothing.
        MissingExtra: A library isn't installed.
    """
    progress(f"1/3 the unedited model {base}")
    pipe = load_pipeline(base)
    family = check_exportable(base, pipe)
    _check_carried(folder / family.component / MODEL, edit)
    inputs = {group: make_inputs(pipe, family, list(texts), timesteps=timesteps) for group, texts in prompts.items()}
    ids = _ids(pipe, family, prompts)
    latents = random_latents(1, (2, pipe.vae.config.latent_channels, LARGEST // 2, LARGEST // 2))
    before = _torch(pipe, family, inputs, ids, latents)
    del pipe
    gc.collect()
    progress(f"2/3 the reference {reference}")
    after = _torch(load_pipeline(reference, edit), family, inputs, ids, latents)
    gc.collect()
    for name, found in (("the base", before), ("the reference", after)):
        if broken := [key for key, array in found.items() if not np.isfinite(array).all()]:
            raise NumericsError(f"{name}: {broken[0][0]} gives values that aren't finite")
    progress(f"3/3 what is to be served {folder}")
    served = _onnx(folder, family, inputs, ids, latents)
    shared = [key for key in after if key in served]
    rows = tuple(_row(key, before[key], after[key], served[key], max_to_move, max_relative) for key in shared)
    if not any(row.to_move is not None for row in rows if row.component == family.component and row.group == "erased"):
        raise NumericsError(
            f"the edit moves nothing on the erased prompts beyond the tolerance: {reference} computes what {base} "
            "does; name the edited model as A, or what was erased with --erased"
        )
    return ComponentParity(family.title, rows, NOT_COMPARED, max_to_move, max_relative)


def _check_carried(path: Path, edit: Edit | None) -> None:
    """Raise unless the export carries ``edit``, as far as it says, and no bank."""
    noted = read_metadata(path)
    if BANK in noted:
        raise UsageError(f"{path} holds a bank of edits: name a folder that carries one edit")
    if edit is not None and noted.get(EDIT_ID, edit.id) != edit.id:
        raise FingerprintMismatch(f"{path} carries the edit {noted[EDIT_ID][:12]}, and the reference {edit.id[:12]}")


def _ids(pipe: Any, family: Denoiser, prompts: Groups) -> dict[tuple[str, str], NDArray[np.int64]]:
    """Token ids by text encoder and group, each encoder's own length."""
    ids = {}
    for name in _TEXT_ENCODERS:
        if getattr(pipe, name, None) is None:
            continue
        tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"))
        length = family.lengths.get(name) or tokenizer.model_max_length
        for group, texts in prompts.items():
            with quiet():
                made = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True)
            ids[name, group] = np.array(made["input_ids"], np.int64)
    return ids


def _torch(
    pipe: Any,
    family: Denoiser,
    inputs: Mapping[str, DenoiserInputs],
    ids: Mapping[tuple[str, str], NDArray[np.int64]],
    latents: Array,
) -> _Outputs:
    """PyTorch's outputs in float32."""
    import torch

    outputs: _Outputs = {}
    with torch.no_grad(), quiet():
        for (name, group), rows in ids.items():
            made = getattr(pipe, name)(torch.from_numpy(rows), output_hidden_states=True)
            named = {key: value for key, value in made.items() if isinstance(value, torch.Tensor)}
            named |= {f"hidden_states.{number}": value for number, value in enumerate(made.hidden_states or ())}
            outputs |= {(name, key, group, None): value.float().numpy() for key, value in named.items()}
        decoded = pipe.vae.decode(torch.from_numpy(latents)).sample
    outputs["vae_decoder", "sample", "latents", None] = decoded.float().numpy()
    for group, given in inputs.items():
        _denoised(outputs, family, group, given, torch_outputs(getattr(pipe, family.component), given))
    return outputs


def _onnx(
    folder: Path,
    family: Denoiser,
    inputs: Mapping[str, DenoiserInputs],
    ids: Mapping[tuple[str, str], NDArray[np.int64]],
    latents: Array,
) -> _Outputs:
    """The export's outputs on ONNX Runtime's CPU provider; one component is in memory at a time."""
    outputs: _Outputs = {}
    for name in dict.fromkeys(name for name, _ in ids):
        feeds = {group: rows for (encoder, group), rows in ids.items() if encoder == name}
        for group, found in _run(folder / name / MODEL, "input_ids", feeds).items():
            outputs |= {(name, key, group, None): array for key, array in found.items()}
    for group, found in _run(folder / "vae_decoder" / MODEL, "latent_sample", {"latents": latents}).items():
        outputs |= {("vae_decoder", key, group, None): array for key, array in found.items()}
    for group, given in inputs.items():
        _denoised(outputs, family, group, given, onnx_outputs(folder / family.component / MODEL, given))
    return outputs


def _denoised(outputs: _Outputs, family: Denoiser, group: str, given: DenoiserInputs, found: Array) -> None:
    for timestep, array in zip(given.timesteps, found, strict=True):
        outputs[family.component, "denoised", group, round(timestep / family.time_scale)] = array


def _run(path: Path, name: str, feeds: Mapping[str, NDArray[Any]]) -> dict[str, dict[str, Array]]:
    """Every output of a model with one input, by what is fed."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingExtra("onnxruntime", "export") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    types = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32}
    types["tensor(float16)"] = np.float16
    found = {}
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        (declared,) = session.get_inputs()
        names = [one.name for one in session.get_outputs()]
        size = declared.shape[0] if isinstance(declared.shape[0], int) else None
        for group, rows in feeds.items():
            parts = []
            for start in range(0, len(rows), size or len(rows)):
                # a fixed batch is filled up with copies of the last row
                chosen = np.minimum(np.arange(start, start + (size or len(rows))), len(rows) - 1)
                parts.append(session.run(names, {declared.name: rows[chosen].astype(types[declared.type])}))
            joined = [np.concatenate(each)[: len(rows)].astype(np.float32) for each in zip(*parts, strict=True)]
            found[group] = dict(zip(names, joined, strict=True))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ArtefactError(f"{path} can't be run with {name}: {reason}") from error
    return found


def _row(
    key: tuple[str, str, str, int | None], before: Array, after: Array, served: Array, to_move: float, relative: float
) -> ComponentRow:
    """One output's verdict: ‖B − A‖ ≤ max(max_to_move ‖A − base‖, max_relative ‖A‖)."""
    if after.shape != served.shape:
        raise ArtefactError(f"{key[0]}: {key[1]} has shape {served.shape}, PyTorch's {after.shape}: export it again")
    size, moved = float(np.linalg.norm(after)), float(np.linalg.norm(after - before))
    counts = moved > relative * size
    if not np.isfinite(served).all():
        return ComponentRow(*key, None, None, moved / size, None, passed=False)
    error = float(np.linalg.norm(served - after))
    return ComponentRow(
        *key,
        max_abs=float(np.abs(served - after).max()),
        relative=error / size,
        moved=moved / size,
        to_move=error / moved if counts else None,
        passed=error <= max(to_move * moved, relative * size),
    )
