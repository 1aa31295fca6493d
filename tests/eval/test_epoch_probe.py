"""Derived embeddings judged by pictures: they show what the embedding says, under the edit that is given."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline

from excise.cli import main
from excise.demo import CLIP
from excise.demo.vocabulary import KEPT, OBJECTS, WEAPONS
from excise.edit.auto_epochs import GAIN, MOST
from excise.edit.erase import erase
from excise.edit.families import family_of
from excise.edit.model_folder import Sites, read_sites
from excise.edit.problem import PROBED, spread
from excise.edit.recipe import Recipe, resolve
from excise.edit.text import load_encoder
from excise.edit.transform import Transform
from excise.editfile import load_edit
from excise.editmetadata import Detection
from excise.errors import ModelError, UsageError
from excise.eval.clip_probe import OTHERS, clip_probe, detector_fingerprint, zero_shot_labels
from excise.eval.detector import ClipDetector
from excise.eval.epoch_probe import EpochProbe
from excise.eval.torch_runtime import TorchRuntime
from excise.export.pipeline import cross_attention, load_pipeline
from excise.serve.runtime import Request


class Album:
    """A detector that keeps the pictures, and sees a gun in the first ``guns`` of them."""

    labels: tuple[str, ...] = ("gun", "cat")

    def __init__(self, guns: int = 0) -> None:
        self.guns, self.images = guns, np.zeros((0, 16, 16, 3), np.uint8)

    def detect(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.intp]:
        self.images = images
        return np.array([number >= self.guns for number in range(len(images))], np.intp)


def unedited(name: str, weight: torch.Tensor) -> torch.Tensor:
    return weight


def flipped(name: str, weight: torch.Tensor) -> torch.Tensor:
    return weight.flip(1)


class Recorder:
    """A probe that judges by a function."""

    detection = Detection(
        detector="fake",
        fingerprint="0" * 64,
        labels=("gun",),
        others=("cat",),
        seeds=(0,),
        scheduler="DDIM",
        num_inference_steps=1,
        guidance_scale=7.5,
    )

    def __init__(self, judge: Callable[[torch.Tensor, Transform], float]) -> None:
        self._judge = judge

    def __call__(self, derived: torch.Tensor, edit: Transform, /) -> float:
        return self._judge(derived, edit)


def embedded(folder: Path, *prompts: str) -> torch.Tensor:
    encoder = load_encoder(folder, family_of(folder))
    return torch.cat([each["text"][0].tokens for each in encoder.embed(prompts)])


def state(pipeline: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}


def same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture
def tiny(tiny_model: Path) -> Any:
    return load_pipeline(tiny_model)


@pytest.fixture(scope="module")
def demo(demo_model: Path) -> Any:
    return load_pipeline(demo_model)


@pytest.fixture(scope="module")
def probe(demo: Any, demo_clip: Path) -> EpochProbe:
    detector = ClipDetector(demo_clip, {name: [name] for name in OBJECTS})
    sites = cross_attention(demo.unet)
    return EpochProbe(demo, detector, WEAPONS, sites, images=3, num_inference_steps=8, progress=False)


# What pictures of the demo model show. Measured: every share below is 0 or 1, at 8, 10, 15 and 25 steps.


def test_a_concepts_own_embedding_shows_it_and_others_do_not(probe: EpochProbe, demo_model: Path) -> None:
    gun = embedded(demo_model, "a gun")
    noise = torch.randn(gun.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise *= gun.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
    assert probe(gun, unedited) >= 0.9
    assert probe(torch.cat([embedded(demo_model, "a cat"), noise]), unedited) <= 0.2


def test_an_edit_takes_it_out_of_the_pictures_and_is_taken_off_again(
    probe: EpochProbe, demo: Any, demo_model: Path
) -> None:
    gun, before = embedded(demo_model, "a gun"), state(demo)
    edit = erase(demo_model, resolve("weapons", None, {"method": "uce"}), certificate=False)
    change = torch.from_numpy(edit.tensors["text.transform"])
    shares = [
        probe(gun, moved) for moved in (unedited, lambda name, weight: (weight.double() @ change).float(), unedited)
    ]
    assert shares[0] == shares[2] >= 0.9
    assert shares[1] <= 0.1
    assert same(before, state(demo))


# The pictures are the runtime's.


@pytest.mark.parametrize("edited", [False, True])
def test_a_prompts_embedding_gives_the_prompts_pictures(tiny: Any, tiny_model: Path, edited: bool) -> None:
    album, sites = Album(), cross_attention(tiny.unet)
    prompts = ["a gun", "a cat on red"]
    pictured = EpochProbe(tiny, album, ["gun"], sites, images=2, num_inference_steps=3, batch_size=3, progress=False)
    pictured(embedded(tiny_model, *prompts), flipped if edited else unedited)
    if edited:
        with torch.no_grad():
            for name, weight in tiny.unet.named_parameters():
                if name in sites:
                    weight.copy_(weight.flip(1))
    requests = [Request(prompt, seed=seed) for prompt in prompts for seed in (0, 1)]
    expected = TorchRuntime(tiny, name="own").generate(requests, num_inference_steps=3)
    # Batches of other sizes may round differently; an unedited model's pictures are some other ones.
    assert np.abs(album.images.astype(int) - expected).max() <= 1
    assert np.ptp(expected.astype(int), axis=0).max() > 10


def test_the_same_pictures_again_and_others_after_an_edit(tiny: Any, tiny_model: Path) -> None:
    album = Album()
    pictured = EpochProbe(tiny, album, ["gun"], cross_attention(tiny.unet), num_inference_steps=2, progress=False)
    found = []
    for moved in (unedited, flipped, unedited):
        pictured(embedded(tiny_model, "a gun"), moved)
        found.append(album.images.astype(int))
    assert len(found[0]) == 4
    assert np.array_equal(found[0], found[2])
    assert np.abs(found[0] - found[1]).max() > 1


def test_the_share_is_over_all_concepts_and_the_bar_on_stderr(
    tiny: Any, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = embedded(tiny_model, "a gun", "a knife", "an axe")
    pictured = EpochProbe(tiny, Album(guns=5), ["gun"], (), images=2, num_inference_steps=1)
    assert pictured(tokens, unedited) == 5 / 6
    output = capsys.readouterr()
    assert output.out == ""


def test_weights_come_back_when_something_fails(tiny: Any, tiny_model: Path) -> None:
    before, sites = state(tiny), cross_attention(tiny.unet)
    seen: list[bool] = []

    def interrupt(*arguments: object) -> None:
        seen.append(same(before, state(tiny)))
        raise KeyboardInterrupt

    pictured = EpochProbe(tiny, Album(), ["gun"], sites, num_inference_steps=1, progress=False)
    hook = tiny.vae.decoder.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        pictured(embedded(tiny_model, "a gun"), flipped)
    hook.remove()
    assert seen == [False]
    assert same(before, state(tiny))


def test_ddim_of_latents_whatever_the_pipelines_own_scheduler(tiny: Any, tiny_model: Path) -> None:
    """PNDM's configuration has no clip_sample."""
    names = ("beta_start", "beta_end", "beta_schedule", "set_alpha_to_one", "steps_offset")
    own = PNDMScheduler(**{name: tiny.scheduler.config[name] for name in names})
    assert "clip_sample" not in own.config
    other = StableDiffusionPipeline(**{**tiny.components, "scheduler": own}, requires_safety_checker=False)
    images = []
    for pipeline in (tiny, other):
        album = Album()
        EpochProbe(pipeline, album, ["gun"], (), num_inference_steps=3, progress=False)(
            embedded(tiny_model, "a gun"), unedited
        )
        images.append(album.images)
    assert isinstance(tiny.scheduler, DDIMScheduler)
    assert other.scheduler is own
    assert np.array_equal(images[0], images[1])


# Refusals.


def test_what_a_probe_refuses(tiny: Any, tiny_model: Path) -> None:
    def made(
        pipeline: Any = tiny, labels: tuple[str, ...] = ("gun",), sites: tuple[str, ...] = (), **given: int
    ) -> Any:
        return EpochProbe(pipeline, Album(), labels, sites, progress=False, **given)

    for wrong, message in (
        ({"pipeline": SimpleNamespace()}, "of a SimpleNamespace"),
        ({"images": 0}, "images must be at least 1, not 0"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1"),
        ({"labels": ("axe",)}, "no label 'axe'"),
        ({"labels": ()}, "others that don't"),
        ({"labels": ("gun", "cat")}, "others that don't"),
    ):
        with pytest.raises(UsageError, match=message):
            made(**wrong)
    with pytest.raises(ModelError, match="has no weight nowhere"):
        made(sites=("nowhere",))
    tokens = embedded(tiny_model, "a gun")
    for part in (tokens[:-1], tokens[:0], tokens[:, :-1], tokens[None]):
        with pytest.raises(UsageError, match="give all 24 positions of each"):
            made()(part, unedited)


# From a recipe.


def recipe(**changes: object) -> Recipe:
    given = {"erase": ("gun", "axe"), "to": ("sunflower",), "keep": ("cat", "", " ", "dog", "cat"), "epochs": 1}
    return resolve(None, None, {**given, **changes})


def test_labels_are_what_is_erased_against_targets_and_what_is_kept() -> None:
    counted, labels = zero_shot_labels(["gun", "axe", "gun"], (), ["sunflower", "cat", "", " ", "axe", "cat"])
    assert counted == ("gun", "axe")
    assert labels == {name: [name] for name in ("gun", "axe", "sunflower", "cat")}
    assert tuple(zero_shot_labels(["gun"], ["owl"], ["cat"])[1]) == ("gun", "owl")
    many = [str(number) for number in range(1000)]
    assert list(zero_shot_labels(["gun"], (), many)[1])[1:] == many[:: 1000 // OTHERS]
    assert len(zero_shot_labels(["gun"], many, ())[1]) == 1001
    for arguments, message in (
        (([" "], (), ["cat"]), "no label counts"),
        ((["gun"], (), ["", " ", "gun"]), "nothing to tell the concept from"),
        ((["gun"], ["cat", "gun"], ()), "'gun' is the concept and --detector-other"),
    ):
        with pytest.raises(UsageError, match=message):
            zero_shot_labels(*arguments)


def test_names_are_checked_before_anything_is_loaded(tiny_model: Path, tmp_path: Path) -> None:
    sites = read_sites(tiny_model)
    other: Any = Sites(SimpleNamespace(name="pixart"), sites.streams)  # type: ignore[arg-type]

    def refuse() -> None:
        raise AssertionError("the pipeline was loaded")

    good: dict[str, Any] = {"recipe": recipe(), "sites": sites, "pipeline": refuse, "detector": "clip:demo"}
    for wrong, message in (
        ({"detector": "nudenet"}, "--detector nudenet is not clip:DIR"),
        ({"detector": "clip:"}, "--detector clip: is not clip:DIR"),
        ({"detector": f"clip:{tmp_path}"}, r"has no config\.json"),
        ({"images": 0}, "--detector-images 0: give 1 or more"),
        ({"recipe": recipe(method="uce")}, "judges RECE's epochs"),
        ({"recipe": recipe(epochs=0)}, "judges RECE's epochs"),
        ({"recipe": recipe(to=(" ",), keep=())}, "give --detector-other"),
        ({"others": ("gun",)}, "'gun' is the concept"),
        ({"sites": other}, "not family pixart"),
    ):
        with pytest.raises(UsageError, match=message):
            clip_probe(**{**good, **wrong})
    with pytest.raises(AssertionError, match="was loaded"):
        clip_probe(**good)(torch.zeros(24, 32), Transform((), 32))


@pytest.mark.parametrize("technique", ["replace", "tensor"])
def test_every_site_carries_its_own_edit(
    tiny_model: Path, demo_clip: Path, technique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While pictures are made, the UNet's weights are those of the edit that ``C'`` was derived against."""
    sites = read_sites(tiny_model, select=lambda name: "up_blocks" in name)
    names = list(sites.streams["text"])
    pipeline = load_pipeline(tiny_model)
    carried: list[dict[str, torch.Tensor]] = []
    edits: list[Transform] = []

    def pictures(self: EpochProbe, embeddings: torch.Tensor, requests: list[Request]) -> npt.NDArray[np.uint8]:
        carried.append(state(pipeline))
        return np.zeros((len(requests), 64, 64, 3), np.uint8)

    monkeypatch.setattr(EpochProbe, "_generate", pictures)
    original, given = state(pipeline), recipe(technique=technique, epochs=2, sites={"layers": "up_blocks"})
    judged = clip_probe(given, sites, lambda: pipeline, detector="clip:demo", images=1, progress=False)

    def recorded(derived: torch.Tensor, edit: Transform) -> float:
        edits.append(edit)
        return judged(derived, edit)

    edit = erase(tiny_model, given, certificate=False, probe=Recorder(recorded))
    assert [stage.detected is None for stage in edit.metadata.stages] == [True, False, False]
    assert edits[0].is_shared == (technique == "replace")
    for found, transform in zip(carried, edits, strict=True):
        moved = {name for name in found if not torch.equal(found[name], original[name])}
        assert moved == set(names)
        for site, name in enumerate(names):
            expected = original[name].double() @ transform.matrix(site)
            torch.testing.assert_close(found[name].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("technique", ["replace", "tensor"])
def test_of_many_concepts_a_few_whole_prompts_are_derived(tiny_model: Path, technique: str) -> None:
    """Of more tokens than dimensions eq. 8 is solved for a matrix: whole prompts go through it."""
    names = list(OBJECTS)[:37]
    seen: list[tuple[torch.Tensor, Transform]] = []

    def record(derived: torch.Tensor, edit: Transform) -> float:
        seen.append((derived, edit))
        return 1.0

    given = recipe(erase=names, to=("art",), keep=(), technique=technique)
    edit = erase(tiny_model, given, certificate=False, probe=Recorder(record))
    assert edit.metadata.detection is not None
    assert edit.metadata.detection.concepts == tuple(names[place] for place in spread(len(names), PROBED))
    ((derived, before),) = seen
    places = spread(len(names), PROBED)
    assert len(set(places)) == PROBED
    assert set(np.diff(places)) == {2, 3}
    tokens = embedded(tiny_model, *(names[place] for place in places))
    assert derived.shape == tokens.shape == (PROBED * 24, 32)
    weights = list(read_sites(tiny_model).streams["text"].values())
    sites = range(len(weights))
    moved = [weight.double() @ before.matrix(site) for site, weight in enumerate(weights)]
    system = torch.stack([moved[i].T @ moved[i] for i in sites]).sum(0) + given.ridge * torch.eye(32).double()
    cross = torch.stack([moved[i].T @ weights[i].double() for i in sites]).sum(0)
    expected = torch.linalg.solve(system, cross @ tokens.T).T
    # Measured: 2e-14.
    assert float((derived - expected).norm() / expected.norm()) < 1e-12


# The command.


@pytest.fixture
def others() -> Iterator[str]:
    return iter([part for name in KEPT for part in ("--detector-other", name)])


def test_the_command_stops_at_the_first_epoch_that_no_picture_needs(
    tmp_path: Path, others: Iterator[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shares are given, since they change with the demo model; the tests above measure real ones."""
    shares = iter([1.0, 0.0])
    monkeypatch.setattr(EpochProbe, "__call__", lambda probe, derived, moved: next(shares))
    out = tmp_path / "gun.safetensors"
    concept = ("--erase", "gun", "--to", "sunflower", "--keep", "cat", "--keep", "dog", "--keep", "car")
    epochs = ("--anchor", "original", "--ridge", "1", "--epochs", "auto")
    judged = ("--detector", "clip:demo", "--detector-images", "2", *others)
    arguments = ("edit", "demo:model", *concept, *epochs, *judged, "--no-cache", "--out", str(out), "--json")
    assert main(arguments) == 0
    output = capsys.readouterr()
    metadata = json.loads(output.out)["metadata"]
    shown = [
        (stage["stage"], stage["detected"], stage.get("detected_after"), stage["accepted"])
        for stage in metadata["stages"]
    ]
    assert shown == [("uce", None, None, True), ("epoch 1", 1.0, 0.0, True), ("epoch 2", 0.0, None, False)]
    assert metadata["detection"] == {
        "detector": "CLIP, zero-shot: the top label",
        "fingerprint": detector_fingerprint(CLIP),
        "labels": ["gun"],
        "others": list(KEPT),
        "concepts": ["gun"],
        "pictures": 2,
        "seeds": [0, 1],
        "scheduler": "DDIM",
        "num_inference_steps": 25,
        "guidance_scale": 7.5,
    }
    assert metadata["stop_rule"] == {"judge": "detector", "gain": GAIN, "most": MOST}
    assert load_edit(out).metadata.model_dump(mode="json") == metadata


def test_a_detector_is_known_by_its_content(demo_clip: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(demo_clip, tmp_path / "elsewhere"))
    assert detector_fingerprint(copy) == detector_fingerprint(demo_clip)
    (copy / "README.md").write_text("mine")
    (copy / "pytorch_model.bin").write_bytes(b"not read beside safetensors")
    assert detector_fingerprint(copy) == detector_fingerprint(demo_clip)
    for name in ("config.json", "model.safetensors"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert detector_fingerprint(copy) != detector_fingerprint(demo_clip)
        (copy / name).write_bytes(content)


def test_the_commands_bad_values_are_one_line(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong, message in (
        (("--detector", "nudenet"), "--detector nudenet is not clip:DIR"),
        (("--detector", "clip:demo", "--detector-images", "0"), "--detector-images 0: give 1 or more"),
        (("--detector", "clip:demo", "--method", "uce"), "judges RECE's epochs"),
        (("--detector-label", "gun"), "need --detector clip:DIR"),
        (("--detector-other", "cat"), "need --detector clip:DIR"),
    ):
        options = ("--erase", "gun", "--keep", "cat", "--no-cache", "--out", str(tmp_path / "e.safetensors"))
        assert main(("edit", str(tiny_model), *options, *wrong)) == 2
        lines = capsys.readouterr().err.splitlines()
        assert [line for line in lines if line.startswith("excise: error: ") and message in line] == lines
    assert list(tmp_path.iterdir()) == []
