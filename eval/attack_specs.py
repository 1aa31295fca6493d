"""Which models an attack is between: the one that is attacked, and the unedited one that says what success is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from urllib.parse import parse_qsl

from excise.edit.model_folder import resolve
from excise.errors import UsageError
from excise.eval.attack_run import ATTACKED, BASE
from excise.eval.runtime_spec import RuntimeSpec, parse_runtime, with_options

_SERVED = ("onnx", "tensorrt", "triton", "openai")
_DEMO = "demo:model"
#: Options that make a model another than the unedited one.
_ERASES = ("edit", "sld", "sld_concept")


def attack_specs(
    model: str, edit: Path | None, base: str | None, device: str = "cpu"
) -> tuple[RuntimeSpec, RuntimeSpec]:
    """The base and the attacked model.

    Args:
        model: a diffusers folder, ``demo:model`` or a hub id, with options after ``?`` as ``runtime_spec`` has them:
            ``DIR?dtype=float16``, ``DIR?sld=medium``.
        edit: is applied to ``model`` in memory.
        base: the unedited model, where ``model`` is an edited folder itself; None is ``model`` without the edit, and
            without a guidance away from a concept.
        device: of both.

    Raises:
        UsageError: what has no gradients (an export, a server), an unknown option, or one that is given twice.
        ModelError: no such folder or model.
    """
    given = {name: value for name, value in (("edit", str(edit or "")), ("device", device)) if value not in ("", "cpu")}
    attacked = _spec(ATTACKED, model, given)
    given.pop("edit", None)
    return _spec(BASE, base or model, given, without=() if base else _ERASES), attacked


def _spec(role: str, model: str, given: Mapping[str, str], *, without: Collection[str] = ()) -> RuntimeSpec:
    source, _, query = model.partition("?")
    kind, colon, _ = source.partition(":")
    if colon and kind in _SERVED:
        raise UsageError(_no_gradients(model))
    place = source.removeprefix("torch:")
    if place != _DEMO:
        folder = resolve(place)
        if (folder / "unet" / "model.onnx").is_file() and not any((folder / "unet").glob("*.safetensors")):
            raise UsageError(_no_gradients(f"onnx:{place}"))
        place = str(folder)
    options = {name: value for name, value in parse_qsl(query, keep_blank_values=True) if name not in without}
    if repeated := sorted(set(options) & set(given)):
        raise UsageError(f"{model}: {repeated[0]} is given by --{repeated[0]} too: leave one out")
    options |= given
    return parse_runtime(f"{role}={with_options(f'torch:{place}', options)}")


def _no_gradients(source: str) -> str:
    return (
        f"{source} has no gradients to attack with: name the diffusers folder that it was made from as --model, with "
        f"--edit FILE, and let what is found be replayed on it: --runtime served={source}"
    )
