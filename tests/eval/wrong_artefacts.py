"""Artefacts that aren't the edited model's, one fault each: a gate must let none of them pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from onnxruntime.quantization import QuantType, quantize_dynamic

from excise.export.patch import patch
from excise.manifest import hash_file
from excise.serve.runtime import Request, Runtime
from tests.eval.artefact_workshop import UNET, Rewired, Workshop, edited_sites

Array = npt.NDArray[Any]
Make = Callable[[Workshop], Runtime]
SCHEDULER = "scheduler/scheduler_config.json"


def _weights(workshop: Workshop, change: Callable[[str, Array, Array], Array]) -> Runtime:
    """Other values of the 14 matrices: ``change`` of the name, the unedited and the edited value."""
    base, edited = workshop.weights(None), workshop.weights(workshop.edit)
    return workshop.open(workshop.rewritten({name: change(name, base[name], edited[name]) for name in base}))


def _unedited_site(site: str, workshop: Workshop) -> Runtime:
    return _weights(workshop, lambda name, base, edited: base if name == site else edited)


def _exchanged(workshop: Workshop) -> Runtime:
    edited = workshop.weights(workshop.edit)
    swapped = {
        n: edited[n.replace(".to_k.", ".X.").replace(".to_v.", ".to_k.").replace(".X.", ".to_v.")] for n in edited
    }
    return workshop.open(workshop.rewritten(swapped))


def _noisy(workshop: Workshop) -> Runtime:
    random, site = np.random.default_rng(0), edited_sites()[0]

    def change(name: str, base: Array, edited: Array) -> Array:
        return edited + 0.05 * edited.std() * random.standard_normal(edited.shape) if name == site else edited

    return _weights(workshop, change)


def _transposed(workshop: Workshop) -> Runtime:
    """A square one, the queries' of the first cross-attention: no shape says that it is the wrong way round."""
    query = workshop.initializer_of("/down_blocks.0/attentions.0/transformer_blocks.0/attn2/to_q/MatMul")

    def change(name: str, before: Array) -> Array:
        assert before.shape[0] == before.shape[1]
        return before.T

    return workshop.open(workshop.reloaded(change, [query]))


def _other_edit(workshop: Workshop) -> Runtime:
    other = workshop.another(erase=("knife", "a knife"), to=("sunflower", "a sunflower"))
    return workshop.open(workshop.rewritten(workshop.weights(other)))


def _stale(workshop: Workshop) -> Runtime:
    """A session that was opened on an earlier edit, which erased one of the six weapons alone, and kept over the patch.

    Its folder is right: no look at the files would find it out.
    """
    earlier = workshop.another(erase=("gun", "a gun"), to=("sunflower", "a sunflower"))
    folder = workshop.copy()
    patch(folder, earlier)
    kept = workshop.open(folder)
    patch(folder, workshop.edit)
    assert all(hash_file(folder / file) == hash_file(workshop.folder / file) for file in (UNET, "unet/edit.onnx_data"))
    return kept


def _overflowing(workshop: Workshop) -> Runtime:
    """Half precision's largest number in place of the largest weights: the next product overflows."""

    def change(name: str, base: Array, edited: Array) -> Array:
        return np.where(np.abs(edited) > np.quantile(np.abs(edited), 0.99), np.float32(np.inf), edited)

    return _weights(workshop, change)


def _quantised(workshop: Workshop) -> Runtime:
    # The onnx package reads no external data with several hard links.
    own = (UNET, "unet/model.onnx_data", "unet/edit.onnx_data")
    source, out = workshop.copy(*own), workshop.copy(*own)
    (out / UNET).unlink()
    quantize_dynamic(source / UNET, out / UNET, weight_type=QuantType.QInt8)
    return workshop.open(out)


def _other_text_encoder(workshop: Workshop) -> Runtime:
    random = np.random.default_rng(0)

    def change(name: str, before: Array) -> Array:
        if "mlp/fc1" not in name or before.dtype != np.float32 or before.ndim < 2:
            return before
        return before.std() * random.standard_normal(before.shape)

    return workshop.open(workshop.recoded(change))


def _configured(file: str, workshop: Workshop, **values: Any) -> Runtime:
    return workshop.open(workshop.configured(file, lambda document: document.update(values)))


def _rewired(workshop: Workshop, **faults: Any) -> Runtime:
    return Rewired(workshop.open(), **faults)


def _each(change: Callable[[Request], Request]) -> Callable[[Sequence[Request]], Sequence[Request]]:
    return lambda requests: [change(request) for request in requests]


def _prompt(change: Callable[[str], str]) -> Callable[[Sequence[Request]], Sequence[Request]]:
    return _each(lambda request: dataclasses.replace(request, prompt=change(request.prompt)))


WRONG: Mapping[str, Make] = {
    "unedited UNet": lambda shop: _weights(shop, lambda name, base, edited: base),
    **{f"unedited {site.removesuffix('.weight')}": partial(_unedited_site, site) for site in edited_sites()},
    "K alone edited": lambda shop: _weights(shop, lambda name, base, edited: edited if ".to_k." in name else base),
    "V alone edited": lambda shop: _weights(shop, lambda name, base, edited: edited if ".to_v." in name else base),
    "half strength": lambda shop: _weights(shop, lambda name, base, edited: (base + edited) / 2),
    "90 % strength": lambda shop: _weights(shop, lambda name, base, edited: base + 0.9 * (edited - base)),
    "the edit's difference twice": lambda shop: _weights(shop, lambda name, base, edited: 2 * edited - base),
    "another edit": _other_edit,
    "stale session of an earlier edit": _stale,
    "K and V exchanged": _exchanged,
    "one matrix transposed": _transposed,
    "5 % noise on one matrix": _noisy,
    "half-precision overflow": _overflowing,
    "int8 without calibration": _quantised,
    "text encoder with other weights": _other_text_encoder,
    "Euler in place of DDIM": lambda shop: _configured(SCHEDULER, shop, _class_name="EulerDiscreteScheduler"),
    "other timestep spacing": lambda shop: _configured(SCHEDULER, shop, timestep_spacing="trailing"),
    "other noise schedule": lambda shop: _configured(SCHEDULER, shop, beta_end=0.02),
    "wrong VAE scaling factor": lambda shop: _configured("vae_decoder/config.json", shop, scaling_factor=0.9),
    "rows of a batch shuffled": lambda shop: _rewired(shop, images=lambda images: images[::-1]),
    "colour channels exchanged": lambda shop: _rewired(shop, images=lambda images: images[..., ::-1]),
    "images mirrored": lambda shop: _rewired(shop, images=lambda images: images[:, :, ::-1]),
    "seeds off by one": lambda shop: _rewired(
        shop, requests=_each(lambda request: dataclasses.replace(request, seed=request.seed + 1))
    ),
    "guidance ignored": lambda shop: _rewired(shop, guidance=lambda scale: 1.0),
    "guidance 5.5 in place of 5": lambda shop: _rewired(shop, guidance=lambda scale: 1.1 * scale),
    "one step fewer": lambda shop: _rewired(shop, steps=lambda steps: steps - 1),
    "first word of prompts lost": lambda shop: _rewired(shop, requests=_prompt(lambda text: text.partition(" ")[2])),
    "prompt sent as the negative one": lambda shop: _rewired(
        shop,
        requests=_each(lambda request: Request("", request.prompt, request.seed, request.index)),
    ),
}
#: In the default run; all of them in ``make test-all``.
FEW = (
    "unedited UNet",
    f"unedited {edited_sites()[0].removesuffix('.weight')}",
    f"unedited {edited_sites()[-1].removesuffix('.weight')}",
    "V alone edited",
    "90 % strength",
    "stale session of an earlier edit",
    "half-precision overflow",
    "Euler in place of DDIM",
    "rows of a batch shuffled",
    "guidance 5.5 in place of 5",
)
