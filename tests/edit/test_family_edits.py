"""An edit of every model family against a least-squares solve of each layer's outputs, from diffusers' own embeddings.

A layer puts out ``W c + b``. What an edit aims at are its outputs (UCE, Gandikota et al., WACV 2024, arXiv 2308.14761,
eq. 3), solved here as one stacked system for each layer, with nothing shared between layers and no normal equations:

    min over W' of  s Σ ‖(W' c + b) − (W c* + b)‖² + λ₁ Σ ‖(W' p + b) − (W p + b)‖² + λ₂ ‖W' − W‖²

RECE's eq. 7 (Gong et al., ECCV 2024, arXiv 2407.12383) likewise: ``‖(W'_i c' + b_i) − (W_i c + b_i)‖²`` of all layers
of a stream at once, and ``λ ‖c'‖²``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from excise.cli import main
from excise.edit.apply import apply_edit
from excise.edit.erase import erase
from excise.edit.families import family_of
from excise.edit.fitter import orthogonal_to
from excise.edit.recipe import Recipe, resolve
from excise.edit.text import load_encoder
from excise.editfile import Edit
from excise.errors import UsageError
from tests.edit import tiny_models as tiny

Builder = Callable[[], Any]
Folders = Callable[[Builder], Path]
Array = npt.NDArray[np.float64]

CONCEPTS, TARGETS, KEPT = ("gun", "a sword in red"), ("sunflower", "dog"), ("cat", "a blue painting")


def stable_diffusion_2() -> Any:
    """Another width of text, projections in and out of the transformer as matrices, heads by block."""
    return tiny.stable_diffusion(
        text={"width": 48, "hidden_act": "gelu"},
        cross_attention_dim=48,
        use_linear_projection=True,
        attention_head_dim=(2, 4),
    )


def inpainting() -> Any:
    """A UNet that reads the mask and the masked picture too: 9 channels."""
    components = tiny.stable_diffusion(in_channels=9, sample_size=8).components
    return diffusers.StableDiffusionInpaintPipeline(**components, requires_safety_checker=False)


def latent_consistency() -> Any:
    components = tiny.stable_diffusion(time_cond_proj_dim=16).components
    return diffusers.LatentConsistencyModelPipeline(
        **{**components, "scheduler": diffusers.LCMScheduler()}, requires_safety_checker=False
    )


BUILDERS: tuple[Builder, ...] = (
    tiny.stable_diffusion,
    stable_diffusion_2,
    inpainting,
    latent_consistency,
    tiny.stable_diffusion_xl,
    tiny.stable_diffusion_xl_refiner,
    tiny.stable_diffusion_3,
    tiny.stable_diffusion_3_without_t5,
    tiny.flux,
    tiny.hidream,
    tiny.pixart,
    tiny.pixart_sigma,
)
#: Those whose layers that read text have a bias.
BIASED = (tiny.stable_diffusion_3, tiny.stable_diffusion_3_without_t5, tiny.flux, tiny.pixart, tiny.pixart_sigma)

every_family = pytest.mark.parametrize("builder", BUILDERS, ids=lambda builder: builder.__name__)
# HiDream's pipeline asks for attentions that it doesn't use.
ignoring_attentions = pytest.mark.filterwarnings("ignore:`output_attentions=True` is not supported:UserWarning")


def recipe(**changes: Any) -> Recipe:
    return resolve(None, None, {"erase": CONCEPTS, "to": TARGETS, "keep": KEPT, **changes})


UCE = recipe(method="uce", erase_scale=1.5, keep_scale=0.7, regularization=0.3)
CURRENT, ORIGINAL = (recipe(epochs=2, anchor=anchor, ridge=0.05, keep_scale=0.7) for anchor in ("current", "original"))


def loaded(folder: Path) -> Any:
    kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    lacks_t5 = kind == "StableDiffusion3Pipeline" and not (folder / "text_encoder_3").exists()
    pipeline = DiffusionPipeline.from_pretrained(
        folder, **({"text_encoder_3": None, "tokenizer_3": None} if lacks_t5 else {})
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def denoiser(pipeline: Any) -> Any:
    return pipeline.components.get("unet") or pipeline.components["transformer"]


@dataclass(frozen=True)
class Text:
    """One prompt as a stream has it: rows by segment, and the attention mask's sum of each; None for a pooled one."""

    segments: tuple[tuple[Array, int | None], ...]

    @property
    def rows(self) -> Array:
        return np.concatenate([tokens for tokens, _ in self.segments])


@torch.no_grad()
def read(pipeline: Any, prompts: Sequence[str]) -> dict[str, list[Text]]:
    """What the pipeline's ``encode_prompt`` passes to the denoiser, by stream, cut at its tokenizers' lengths."""
    options: dict[str, Any] = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    given, kind = list(prompts), type(pipeline).__name__
    embedded: dict[str, tuple[torch.Tensor, Sequence[tuple[str, int]]]] = {}
    if kind.startswith("StableDiffusion3"):
        context, _, pooled, _ = pipeline.encode_prompt(given, None, None, **options)
        embedded = {"context": (context, [("tokenizer", 24), ("tokenizer_3", 256)]), "pooled": (pooled[:, None], ())}
    elif kind.startswith("Flux"):
        context, pooled, _ = pipeline.encode_prompt(given, None, device="cpu")
        embedded = {"context": (context, [("tokenizer_2", 512)]), "pooled": (pooled[:, None], ())}
    elif kind.startswith("HiDream"):
        t5, _, layers, *_ = pipeline.encode_prompt(given, **options)
        embedded = {f"llama.{n}": (layers[n], [("tokenizer_4", 128)]) for n in (0, 2)}
        embedded["t5"] = t5, [("tokenizer_3", 128)]
    else:
        tokens = pipeline.encode_prompt(given, **options)[0]
        tokenizer = "tokenizer_2" if kind.startswith("StableDiffusionXL") else "tokenizer"
        embedded = {"text": (tokens, [(tokenizer, tokens.shape[1])])}
    return {
        stream: [_text(pipeline, prompt, tensor[number], parts) for number, prompt in enumerate(given)]
        for stream, (tensor, parts) in embedded.items()
    }


def _text(pipeline: Any, prompt: str, tokens: torch.Tensor, parts: Sequence[tuple[str, int]]) -> Text:
    rows = tokens.double().numpy()
    if not parts:
        return Text(((rows, None),))
    segments: list[tuple[Array, int | None]] = []
    for name, positions in parts:
        tokenizer = getattr(pipeline, name)
        # Zeros stand for an encoder that the pipeline lacks: whatever is chosen of them says nothing.
        mask = tokenizer(prompt, padding="max_length", max_length=positions).attention_mask if tokenizer else [1, 1]
        segments.append((rows[:positions], sum(mask)))
        rows = rows[positions:]
    assert not len(rows)
    return Text(tuple(segments))


def from_last_subject(concept: Text, target: Text) -> tuple[Array, Array]:
    """``C`` and ``C*`` as published: from ``attention_mask.sum() − 2`` on, cut to the same length."""
    pairs = []
    for (source, length), (aim, aim_length) in zip(concept.segments, target.segments, strict=True):
        if length is not None and aim_length is not None:
            source, aim = source[max(length - 2, 0) :], aim[max(aim_length - 2, 0) :]
        count = min(len(source), len(aim))
        pairs.append((source[:count], aim[:count]))
    return np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs])


@dataclass(frozen=True)
class Layer:
    weight: Array
    bias: Array

    def __call__(self, rows: Array) -> Array:
        return rows @ self.weight.T + self.bias

    def solved(
        self, pairs: Sequence[tuple[Array, Array]], kept: Array, scales: tuple[float, float, float], times: int = 1
    ) -> Layer:
        """The layer whose outputs for the erased rows come nearest to these for their targets. ``scales``: s, λ₁, λ₂.

        ``times`` is how often the aims count the bias: the published UCE's do it twice, once in the output that it aims
        at and once in the layer that it edits.
        """
        s, keep, ridge = np.sqrt(scales)
        surplus = (times - 1) * self.bias
        left = [ridge * np.eye(self.weight.shape[1]), keep * kept, *(s * source for source, _ in pairs)]
        aims = [self(kept), *(self(target) for _, target in pairs)]
        factors = [keep] + [s] * len(pairs)
        right = [factor * (aim + surplus - self.bias) for factor, aim in zip(factors, aims, strict=True)]
        wanted = np.concatenate([ridge * self.weight.T, *right])
        solution, *_ = np.linalg.lstsq(np.concatenate(left), wanted, rcond=None)
        return Layer(solution.T, self.bias)


def brute_force(
    layers: Mapping[str, Layer], texts: Sequence[tuple[Text, Text]], kept: Array, chosen: Recipe, times: int = 1
) -> dict[str, Layer]:
    """All layers of one stream, each by itself."""
    erased = [from_last_subject(*pair) for pair in texts]
    whole = [(concept.rows, target.rows) for concept, target in texts]
    scales = (chosen.erase_scale, float(chosen.keep_scale), chosen.regularization)
    edited = {name: layer.solved(erased, kept, scales, times) for name, layer in layers.items()}
    for _ in range(chosen.epochs if chosen.method == "rece" else 0):  # type: ignore[arg-type]
        ridge = np.sqrt(chosen.ridge) * np.eye(kept.shape[1])
        stacked = np.concatenate([*(layer.weight for layer in edited.values()), ridge])
        pairs = list(erased) if chosen.anchor == "original" else []
        for concept, target in whole:
            wanted = [layers[name](concept) - layer.bias for name, layer in edited.items()]
            right = np.concatenate([*(part.T for part in wanted), np.zeros((kept.shape[1], len(concept)))])
            pairs.append((np.linalg.lstsq(stacked, right, rcond=None)[0].T, target))
        erased = pairs
        start = edited if chosen.anchor == "current" else layers
        edited = {name: layer.solved(pairs, kept, (1.0, 0.1, 0.1)) for name, layer in start.items()}
    return edited


def layers_of(pipeline: Any, sites: Sequence[str]) -> dict[str, Layer]:
    modules = {site: denoiser(pipeline).get_submodule(site.removesuffix(".weight")) for site in sites}
    return {
        site: Layer(
            module.weight.detach().double().numpy(),
            np.zeros(len(module.weight)) if module.bias is None else module.bias.detach().double().numpy(),
        )
        for site, module in modules.items()
    }


def expected(
    pipeline: Any, edit: Edit, chosen: Recipe, texts: Mapping[str, list[Text]], times: int = 1
) -> dict[str, Layer]:
    """Every layer that the edit moves, solved by itself; ``texts`` are concepts, targets and kept prompts in a row."""
    solved: dict[str, Layer] = {}
    for stream in edit.metadata.streams:
        concepts, targets, kept = (texts[stream.name][start : start + 2] for start in (0, 2, 4))
        rows = np.concatenate([text.rows for text in kept])
        pairs = list(zip(concepts, targets, strict=True))
        solved |= brute_force(layers_of(pipeline, stream.sites), pairs, rows, chosen, times)
    return solved


def distance(one: Array, other: Array) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


@ignoring_attentions
@every_family
def test_every_layers_outputs_are_those_of_a_solve_by_itself(folder_of: Folders, builder: Builder) -> None:
    folder = folder_of(builder)
    pipeline = loaded(folder)
    texts = read(pipeline, [*CONCEPTS, *TARGETS, *KEPT])
    # Measured: 4e-13 with 24 tokens of CLIP, 2e-9 with some hundred of T5, 4e-8 with both (SD3: a condition of 9e6).
    tolerance = 1e-11 if denoiser(pipeline) is pipeline.components.get("unet") else 1e-7
    for chosen in (UCE, CURRENT, ORIGINAL):
        edit = erase(folder, chosen, certificate=False)
        original = layers_of(pipeline, edit.sites)
        found = {site: Layer(layer.weight @ edit.matrix(site), layer.bias) for site, layer in original.items()}
        solved = expected(pipeline, edit, chosen, texts)
        assert solved.keys() == found.keys()
        for stream in edit.metadata.streams:
            rows = texts[stream.name][0].rows
            for site in stream.sites:
                assert distance(found[site].weight, solved[site].weight) < tolerance
                assert distance(found[site](rows), solved[site](rows)) < tolerance
                # It is far from what the layer put out before.
                assert distance(found[site](rows), original[site](rows)) > 0.01
    assert any(layer.bias.any() for layer in original.values()) == (builder in BIASED)


@pytest.mark.parametrize("builder", BIASED, ids=lambda builder: builder.__name__)
def test_a_bias_that_is_counted_twice_would_be_seen(folder_of: Folders, builder: Builder) -> None:
    """As in the published UCE: it aims at an output with the bias, by a weight without it."""
    pipeline = loaded(folder_of(builder))
    texts = read(pipeline, [*CONCEPTS, *TARGETS, *KEPT])
    edit = erase(folder_of(builder), UCE, certificate=False)
    original = layers_of(pipeline, edit.sites)
    for site, wrong in expected(pipeline, edit, UCE, texts, times=2).items():
        # Measured: from 6e-4 to 5e-2.
        assert distance(original[site].weight @ edit.matrix(site), wrong.weight) > 1e-4


def one_step(pipeline: Any) -> npt.NDArray[Any]:
    """What the pipeline makes of a prompt in one step."""
    kind, given = type(pipeline).__name__, {"height": 16, "width": 16}
    picture = torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    if "Img2Img" in kind:
        given = {"image": picture, "strength": 1.0}  # type: ignore[dict-item]
    elif "Inpaint" in kind:
        given |= {"image": picture, "mask_image": torch.ones(1, 1, 16, 16), "strength": 1.0}  # type: ignore[dict-item]
    elif "PixArt" in kind:
        given["use_resolution_binning"] = False
    elif "HiDream" in kind:
        # Otherwise it makes at least a million pixels.
        pipeline.default_sample_size = 8
    output = pipeline(
        "a gun in red", num_inference_steps=1, output_type="latent", generator=torch.Generator().manual_seed(0), **given
    ).images
    return np.asarray(output)


@ignoring_attentions
@every_family
def test_only_the_sites_move_and_the_pipeline_runs(folder_of: Folders, builder: Builder, tmp_path: Path) -> None:
    folder, edited = folder_of(builder), tmp_path / "edited"
    edit = erase(folder, CURRENT, certificate=False)
    apply_edit(folder, edit, edited)
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert files == {path.relative_to(edited) for path in edited.rglob("*") if path.is_file()}
    moved = set()
    for file in files:
        if file.suffix != ".safetensors":
            assert (folder / file).read_bytes() == (edited / file).read_bytes()
            continue
        before, after = load_file(folder / file), load_file(edited / file)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert tensor.dtype == after[name].dtype
            if not torch.equal(tensor, after[name]):
                moved.add(f"{file.parent}/{name}")
    assert moved == {f"{edit.metadata.component}/{site}" for site in edit.sites}
    original, pipeline = loaded(folder), loaded(edited)
    before_layers, layers = layers_of(original, edit.sites), layers_of(pipeline, edit.sites)
    for site, layer in layers.items():
        # Rounded once to float32. Measured: 6e-8.
        assert distance(layer.weight, before_layers[site].weight @ edit.matrix(site)) < 3e-7
    one, other = one_step(original), one_step(pipeline)
    assert np.isfinite(other).all()
    assert not np.array_equal(one, other)


def test_k_or_v_alone_of_stable_diffusion_xl(folder_of: Folders, tmp_path: Path) -> None:
    folder = folder_of(tiny.stable_diffusion_xl)
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    for projection in ("k", "v"):
        edit = erase(folder, recipe(sites={"projections": projection}, epochs=2), certificate=False)
        apply_edit(folder, edit, tmp_path / projection)
        after = load_file(tmp_path / projection / "unet" / "diffusion_pytorch_model.safetensors")
        moved = {name for name, weight in weights.items() if not torch.equal(weight, after[name])}
        assert moved == set(edit.sites)
        assert moved == {name for name in weights if name.endswith(f"attn2.to_{projection}.weight")}
        # RECE derives what regenerates the concept in the layers that it edits, and in no other.
        pipeline = loaded(folder)
        texts = read(pipeline, [*CONCEPTS, *TARGETS, *KEPT])
        for site, layer in expected(pipeline, edit, recipe(epochs=2), texts).items():
            assert distance(weights[site].double().numpy() @ edit.matrix(site), layer.weight) < 1e-11


def test_k_and_v_of_one_projection_have_no_halves(folder_of: Folders) -> None:
    for projection in ("k", "v"):
        with pytest.raises(UsageError, match=f"projections = {projection}: .* projects the text for K and V together"):
            erase(folder_of(tiny.stable_diffusion_3), recipe(sites={"projections": projection}))


@pytest.mark.parametrize("builder", [tiny.stable_diffusion_xl, tiny.stable_diffusion_3_without_t5])
@pytest.mark.parametrize("method", ["uce", "rece"])
def test_conditional_only_leaves_the_empty_prompts_outputs(
    folder_of: Folders, builder: Builder, method: str, tmp_path: Path
) -> None:
    folder = folder_of(builder)
    outputs: dict[str, dict[str, list[Array]]] = {}
    for name in ("plain", "held"):
        edit = erase(folder, recipe(method=method, epochs=2, sites={"conditional_only": name == "held"}))
        apply_edit(folder, edit, tmp_path / name)
    for name, place in (("before", folder), ("plain", tmp_path / "plain"), ("held", tmp_path / "held")):
        pipeline = loaded(place)
        texts = read(pipeline, ["", CONCEPTS[0]])
        outputs[name] = {
            site: [layer(text.rows) for text in texts[stream.name]]
            for stream in edit.metadata.streams
            for site, layer in layers_of(pipeline, stream.sites).items()
        }
    assert outputs["before"].keys() == set(edit.sites)
    for site, (empty, concept) in outputs["before"].items():
        # Measured: from 5e-8 to 7e-7, the rounding of the edited weights to float32.
        assert distance(outputs["held"][site][0], empty) < 3e-6
        assert distance(outputs["plain"][site][0], empty) > 0.1
        assert distance(outputs["held"][site][1], concept) > 0.1


@pytest.mark.parametrize("method", ["rece", "leace"])
def test_an_empty_prompt_that_spans_everything_leaves_nothing_to_edit(folder_of: Folders, method: str) -> None:
    """24 tokens in 24 dimensions: an edit that holds them all would be none."""
    chosen = recipe(method=method, sites={"conditional_only": True})
    with pytest.raises(UsageError, match="tokens span all 24 dimensions"):
        erase(folder_of(tiny.stable_diffusion_xl_refiner), chosen)


@pytest.mark.parametrize("method", ["rece", "leace"])
@pytest.mark.parametrize(("builder", "tokens", "used"), [(tiny.stable_diffusion_3, 280, 30), (tiny.flux, 512, 6)])
def test_padding_that_differs_by_rounding_alone_spans_nothing(
    folder_of: Folders, builder: Builder, tokens: int, used: int, method: str
) -> None:
    """More tokens than dimensions, all 64 to the last bit, but most say the same: there is something to edit."""
    folder = folder_of(builder)
    encoder = load_encoder(folder, family_of(folder))
    empty, concept = (
        torch.cat([segment.tokens for segment in each["context"]]) for each in encoder.embed(["", CONCEPTS[0]])
    )
    assert len(empty) == tokens
    assert int(torch.linalg.matrix_rank(empty)) == 64
    assert 64 - orthogonal_to(empty).shape[1] == used
    # Pooled, a prompt has one token alone.
    edit = erase(folder, recipe(method=method, sites={"conditional_only": True}))
    change = torch.from_numpy(edit.tensors["context.transform"]) - torch.eye(64, dtype=torch.float64)
    # Measured: 2.1e-6 at most, and 9e-3 at least.
    assert (empty @ change.T).norm() < 1e-5 * empty.norm()
    assert (concept @ change.T).norm() > 1e-3 * concept.norm()


HALVES = [(torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)]


@pytest.mark.parametrize(("dtype", "unit"), HALVES, ids=["float16", "bfloat16"])
@pytest.mark.parametrize("builder", [tiny.stable_diffusion, tiny.stable_diffusion_xl, tiny.stable_diffusion_3])
def test_half_precision_is_a_way_of_storing(
    folder_of: Folders, builder: Builder, dtype: torch.dtype, unit: float, tmp_path: Path
) -> None:
    """The edit is solved from the numbers that are stored, and only its result is rounded to their dtype."""
    exact, half, wide = folder_of(builder), tmp_path / "half", tmp_path / "wide"
    _stored_as(exact, half, lambda tensor: tensor.to(dtype))
    _stored_as(half, wide, lambda tensor: tensor.float())
    edit, same = (erase(folder, UCE, certificate=False) for folder in (half, wide))
    assert edit.metadata.weights_fingerprint == same.metadata.weights_fingerprint
    # The same numbers in the same order: equal bit for bit.
    assert edit.id == same.id
    for folder, name in ((exact, "exact-edited"), (half, "half-edited"), (wide, "wide-edited")):
        apply_edit(folder, erase(folder, UCE, certificate=False), tmp_path / name)
    file = Path(edit.metadata.component) / "diffusion_pytorch_model.safetensors"
    weights = {name: load_file(tmp_path / f"{name}-edited" / file) for name in ("exact", "half", "wide")}
    for site in edit.sites:
        rounded, float32, unrounded = (weights[name][site] for name in ("half", "wide", "exact"))
        assert rounded.dtype == dtype
        assert rounded.isfinite().all()
        assert torch.equal(rounded, float32.to(dtype))
        # Measured: from 1.6 to 61 units; the edit amplifies the rounding of the text encoder's weights.
        assert 0 < distance(rounded.double().numpy(), unrounded.double().numpy()) < 200 * unit


def _stored_as(folder: Path, out: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    shutil.copytree(folder, out)
    for file in out.rglob("*.safetensors"):
        tensors = load_file(file)
        save_file(
            {name: change(t) if t.is_floating_point() else t for name, t in tensors.items()}, file, {"format": "pt"}
        )


def _one_half(tensors: dict[str, torch.Tensor], site: str) -> None:
    tensors[site] = tensors[site].half()


def _int8(tensors: dict[str, torch.Tensor], site: str) -> None:
    tensors[site] = (tensors[site] * 100).to(torch.int8)


def _float8(tensors: dict[str, torch.Tensor], site: str) -> None:
    tensors.update({name: t.to(torch.float8_e4m3fn) for name, t in tensors.items() if t.ndim == 2})


@pytest.mark.parametrize("component", ["denoiser", "text encoder"])
@pytest.mark.parametrize(
    ("store", "message"), [(_one_half, "store all in one dtype"), (_int8, "is quantised"), (_float8, "is quantised")]
)
@pytest.mark.parametrize("builder", [tiny.stable_diffusion, tiny.flux])
def test_weights_that_are_not_plain_numbers_are_refused_by_the_command_line(
    folder_of: Folders, tmp_path: Path, capfd: pytest.CaptureFixture[str], builder: Builder, component: str,
    store: Callable[[dict[str, torch.Tensor], str], None], message: str,
) -> None:  # fmt: skip
    folder = Path(shutil.copytree(folder_of(builder), tmp_path / "model"))
    edit = erase(folder, UCE, certificate=False)
    file, site = folder / edit.metadata.component / "diffusion_pytorch_model.safetensors", edit.sites[0]
    if component == "text encoder":
        file, site = folder / "text_encoder" / "model.safetensors", "text_model.encoder.layers.0.mlp.fc1.weight"
    tensors = load_file(file)
    store(tensors, site)
    save_file(tensors, file, {"format": "pt"})
    before = sorted(tmp_path.rglob("*"))
    options = ["--erase", "gun", "--to", "sunflower", "--no-cache", "--out", str(tmp_path / "edit.safetensors")]
    status = main(["edit", str(folder), *options])
    lines = capfd.readouterr().err.splitlines()
    if component == "text encoder" and store is _one_half:
        # Some large encoders are stored so; they are read in float32.
        assert (status, len(list(tmp_path.glob("*.safetensors")))) == (0, 1)
        return
    assert status == 2
    errors = [line for line in lines if not line.startswith("excise: ") or line.startswith("excise: error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert site in errors[0] or store is _float8
    assert sorted(tmp_path.rglob("*")) == before
