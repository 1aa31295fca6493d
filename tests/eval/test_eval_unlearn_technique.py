"""The plug-in for eval-unlearn: what the benchmark asks of a technique, and that the export itself answers.

``Runner`` stands in for the benchmark's own, from its signatures. The last test runs the real one, in this environment
or in that of the interpreter that ``EXCISE_EVAL_UNLEARN_PYTHON`` names: its pins can't be met beside Optimum's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from safetensors.numpy import load_file

from excise.editfile import Edit, save_edit
from excise.errors import ArtefactError, EditError, ExciseError, PromptTooLong, UsageError
from excise.eval.eval_unlearn_technique import CuttingTokenizer, ExciseTechnique, TechniqueOptions
from excise.export.bank import add_bank
from excise.export.onnx_export import export_pipeline
from excise.serve.onnx_runtime import OnnxRuntime
from excise.serve.runtime import Request
from tests.random_edits import random_edit

GROUP, NAME, CLASS = "eval_unlearn.techniques", "excise", "excise.eval.eval_unlearn_technique:ExciseTechnique"
PROMPTS = ["a gun", "a red apple", "an owl"]
STEPS, SCALE = 3, 5.0
SETTINGS = {"threads": 1, "num_inference_steps": STEPS, "guidance_scale": SCALE}

#: More tokens than the tiny model's 24. In the last, the one before the cut lies inside a word.
LONG = ["owl " * 40, "a very small owl on a tree, " * 5, "gun, " * 10 + "unforgettable extraordinarily"]


@pytest.fixture(scope="module")
def exported(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "onnx"
    export_pipeline(tiny_model, out)
    return out


@pytest.fixture(scope="module")
def edits(tiny_model: Path) -> tuple[Edit, Edit]:
    weights = load_file(tiny_model / "unet" / "diffusion_pytorch_model.safetensors")
    sites = {name: w for name, w in weights.items() if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    return random_edit(sites, 1, scale=0.3), random_edit(sites, 2, scale=0.3)


@pytest.fixture(scope="module")
def edit_files(edits: tuple[Edit, Edit], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    first, second = (tmp_path_factory.mktemp("edits") / f"{number}.safetensors" for number in range(2))
    for path, edit in zip((first, second), edits, strict=True):
        save_edit(path, edit)
    return first, second


@pytest.fixture(scope="module")
def technique(exported: Path) -> ExciseTechnique:
    return ExciseTechnique(folder=str(exported), **SETTINGS)


def pixels(images: Sequence[Image.Image]) -> npt.NDArray[np.uint8]:
    assert all(image.mode == "RGB" for image in images)
    return np.stack([np.asarray(image) for image in images])


def expected(runtime: OnnxRuntime, prompts: Sequence[str], first: int, **settings: Any) -> npt.NDArray[np.uint8]:
    requests = [Request(prompt, seed=first + place) for place, prompt in enumerate(prompts)]
    return runtime.generate(requests, **{"num_inference_steps": STEPS, "guidance_scale": SCALE} | settings)


class Runner:
    """What eval-unlearn's runners do with a technique: one from its config, one call a batch, ``save`` each image."""

    def __init__(self, factory: Callable[..., Any], config: dict[str, Any], seed: int | None = None) -> None:
        self.technique, self.seed = factory(**config), seed

    def run(self, batches: Sequence[list[str]], folder: Path) -> list[Path]:
        saved: list[Path] = []
        for prompts in batches:
            images = self.technique.generate(prompts=prompts, seed=self.seed)
            assert len(images) == len(prompts)
            for image in images:
                saved.append(folder / f"{len(saved)}.png")
                image.save(str(saved[-1]))
        return saved


def test_the_benchmark_gets_the_exports_own_images(exported: Path, technique: ExciseTechnique, tmp_path: Path) -> None:
    # The config has been through JSON or YAML, as the benchmark's has.
    config = json.loads(json.dumps({"folder": str(exported), **SETTINGS, "erase_concept": "gun", "seed": 40}))
    factory = EntryPoint(name=NAME, value=CLASS, group=GROUP).load()
    saved = Runner(factory, config).run([PROMPTS[:2], PROMPTS[2:]], tmp_path)
    found = pixels([Image.open(path) for path in saved])
    assert found.shape == (3, 16, 16, 3)
    # A batch of two and one of one against one of three: measured 0, and with other seeds at least 161 in each image.
    wanted = expected(technique.runtime, PROMPTS, 40).astype(int)
    assert np.abs(found - wanted).max() <= 1
    assert np.abs(found - expected(technique.runtime, PROMPTS, 41)).reshape(3, -1).max(1).min() > 10


def test_a_batchs_seed_is_its_first_images(technique: ExciseTechnique) -> None:
    np.testing.assert_array_equal(pixels(technique.generate(PROMPTS, seed=7)), expected(technique.runtime, PROMPTS, 7))
    one = pixels(technique.generate(PROMPTS[1:2], seed=8))
    assert np.abs(one.astype(int) - expected(technique.runtime, PROMPTS, 7)[1:2]).max() <= 1


def test_without_a_seed_they_go_on_over_the_run(exported: Path) -> None:
    technique = ExciseTechnique(folder=str(exported), seed=5, **SETTINGS)
    first = pixels(technique.generate(["an owl"] * 2))
    technique.generate(["an owl"], seed=99)  # a batch with a seed of its own is no part of that
    second = pixels(technique.generate(["an owl"] * 2))
    np.testing.assert_array_equal(first, expected(technique.runtime, ["an owl"] * 2, 5))
    np.testing.assert_array_equal(second, expected(technique.runtime, ["an owl"] * 2, 7))
    assert len({image.tobytes() for image in (*first, *second)}) == 4


def test_no_prompt_is_no_image(technique: ExciseTechnique) -> None:
    assert technique.generate([]) == []


def test_a_call_can_have_its_own_steps_and_scale(technique: ExciseTechnique) -> None:
    found = pixels(technique.generate(PROMPTS, seed=1, num_inference_steps=2, guidance_scale=1.0))
    wanted = expected(technique.runtime, PROMPTS, 1, num_inference_steps=2, guidance_scale=1.0)
    np.testing.assert_array_equal(found, wanted)
    assert (found != pixels(technique.generate(PROMPTS, seed=1))).any()


def test_an_edit_takes_effect_and_is_told(
    exported: Path,
    edits: tuple[Edit, Edit],
    edit_files: tuple[Path, Path],
    technique: ExciseTechnique,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edited = ExciseTechnique(folder=str(exported), edit=str(edit_files[0]), **SETTINGS)
    assert (technique.edit_id, edited.edit_id) == (None, edits[0].id)
    assert capsys.readouterr().err == f"excise: judging {exported} in ONNX Runtime (cpu), edit {edits[0].id}\n"
    found = pixels(edited.generate(PROMPTS, seed=3))
    np.testing.assert_array_equal(found, expected(OnnxRuntime(exported, threads=1, edit=edits[0]), PROMPTS, 3))
    # Measured: at least 16 levels in each image.
    unedited = expected(technique.runtime, PROMPTS, 3).astype(int)
    assert np.abs(found - unedited).reshape(3, -1).max(1).min() > 10


def bank_of(exported: Path, folder: Path, edits: Sequence[Edit], *, with_base: bool) -> str:
    shutil.copytree(
        exported, folder, ignore=lambda path, names: names if Path(path).name == "unet" else ["excise.json"]
    )
    shutil.copy(exported / "unet" / "config.json", folder / "unet")
    add_bank(exported / "unet" / "model.onnx", folder / "unet" / "model.onnx", edits, with_base=with_base)
    return str(folder)


def test_of_a_bank_the_named_edit_is_judged(
    exported: Path,
    edits: tuple[Edit, Edit],
    edit_files: tuple[Path, Path],
    technique: ExciseTechnique,
    tmp_path: Path,
) -> None:
    both = bank_of(exported, tmp_path / "both", edits, with_base=False)
    for edit, file in zip(edits, edit_files, strict=True):
        judged = ExciseTechnique(folder=both, edit=str(file), **SETTINGS)
        assert judged.edit_id == edit.id
        found = pixels(judged.generate(PROMPTS, seed=3)).astype(int)
        wanted = expected(OnnxRuntime(exported, threads=1, edit=edit), PROMPTS, 3)
        assert np.abs(found - wanted).max() <= 1
    with pytest.raises(UsageError, match="no edit named, and the bank has no base"):
        ExciseTechnique(folder=both, **SETTINGS)

    first = bank_of(exported, tmp_path / "first", edits[:1], with_base=True)
    with pytest.raises(UsageError, match="isn't in the bank"):
        ExciseTechnique(folder=first, edit=str(edit_files[1]), **SETTINGS)
    base = ExciseTechnique(folder=first, **SETTINGS)
    assert base.edit_id is None
    found = pixels(base.generate(PROMPTS, seed=3)).astype(int)
    assert np.abs(found - expected(technique.runtime, PROMPTS, 3)).max() <= 1


def test_long_prompts_are_cut_as_diffusers_cuts_them(
    technique: ExciseTechnique, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    tokenizer = technique.runtime.tokenizer
    assert isinstance(tokenizer, CuttingTokenizer)
    limit = tokenizer.max_length
    ids = pipeline.tokenizer([*LONG, *PROMPTS], padding="max_length", max_length=limit, truncation=True).input_ids
    np.testing.assert_array_equal(tokenizer.encode([*LONG, *PROMPTS]), ids)
    # Why tokens are cut and not the text: the last prompt's, cut there, ends with another token.
    kept = pipeline.tokenizer.decode(ids[2], skip_special_tokens=True)
    assert not np.array_equal(tokenizer.encode([kept])[0], ids[2])

    with torch.no_grad():
        states = pipeline.encode_prompt(LONG, "cpu", 1, False)[0].numpy()
    # Measured: 1.4e-5 at states of up to 3.1; the text cut there is 2.6 away.
    assert np.abs(technique.runtime.encode(LONG) - states).max() < 1e-4
    assert np.abs(technique.runtime.encode([kept])[0] - states[2]).max() > 0.1
    capsys.readouterr()

    images = pixels(technique.generate([LONG[0], "an owl", LONG[1]], seed=1))
    assert capsys.readouterr().err == "excise: 2 of 3 prompts are too long: their first 24 tokens were read\n"
    # Nothing after the cut is read, and all before it is.
    images_too = pixels(technique.generate([LONG[0] + "gun", "an owl", "gun " + LONG[1]], seed=1))
    np.testing.assert_array_equal(images[:2], images_too[:2])
    assert (images[2] != images_too[2]).any()
    capsys.readouterr()
    technique.generate(PROMPTS, seed=1)
    assert capsys.readouterr().err == ""


def test_a_long_prompt_is_an_error_where_none_may_be_cut(exported: Path) -> None:
    strict = ExciseTechnique(folder=str(exported), truncate=False, **SETTINGS)
    with pytest.raises(PromptTooLong, match="this model reads 24: shorten it"):
        strict.generate(["an owl", LONG[0]])
    # Nothing was made: the next image is still the run's first.
    np.testing.assert_array_equal(pixels(strict.generate(PROMPTS)), expected(strict.runtime, PROMPTS, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "technique excise: folder: Field required; its options are folder, edit, provider"),
        ({"folder": ""}, "folder: String should have at least 1 character"),
        ({"folder": "x", "edti": "a.safetensors"}, "edti: Extra inputs are not permitted; its options are folder"),
        ({"folder": "x", "device": "cuda"}, "device: Input should be a valid integer"),
        ({"folder": "x", "provider": "gpu"}, "provider: Input should be 'cpu', 'cuda' or 'tensorrt'"),
        ({"folder": "x", "batch_size": 0}, "batch_size: Input should be greater than or equal to 1"),
        ({"folder": "x", "num_inference_steps": "many"}, "num_inference_steps: Input should be a valid integer"),
        ({"folder": "x", "seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"folder": "x", "truncate": "yes"}, "truncate: Input should be a valid boolean"),
    ],
)
def test_options_that_can_not_be_used(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        ExciseTechnique(**options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_and_edits_that_can_not_be_judged(
    exported: Path, edit_files: tuple[Path, Path], tmp_path: Path
) -> None:
    altered = Path(shutil.copytree(exported, tmp_path / "altered"))
    with (altered / "tokenizer" / "vocab.json").open("a") as stream:
        stream.write(" ")
    incomplete = Path(shutil.copytree(exported, tmp_path / "incomplete"))
    (incomplete / "excise.json").unlink()
    (incomplete / "vae_decoder" / "model.onnx").unlink()
    cases: list[tuple[dict[str, Path], type[ExciseError], str]] = [
        ({"folder": tmp_path / "none"}, ArtefactError, "name a folder that holds an exported pipeline"),
        ({"folder": altered}, ArtefactError, r"isn't as its manifest says: tokenizer/vocab\.json was altered"),
        ({"folder": incomplete}, ArtefactError, r"has no vae_decoder/model\.onnx"),
        ({"folder": exported, "edit": tmp_path / "none.safetensors"}, EditError, "is not a file: name an edit file"),
        ({"folder": incomplete.parent / "altered", "edit": edit_files[0]}, ArtefactError, "isn't as its manifest says"),
    ]
    for options, kind, message in cases:
        with pytest.raises(kind, match=message):
            ExciseTechnique(**{name: str(path) for name, path in options.items()})


def test_what_a_technique_does_not_do_is_refused(technique: ExciseTechnique) -> None:
    with pytest.raises(UsageError, match="generate has no argument 'height', 'width'"):
        technique.generate(PROMPTS, width=8, height=8)
    with pytest.raises(UsageError, match="prompts='an owl' is one text"):
        technique.generate("an owl")
    with pytest.raises(UsageError, match="seed=-3"):
        technique.generate(PROMPTS, seed=-3)


def test_neither_pytorch_nor_the_benchmark_is_imported(exported: Path) -> None:
    code = (
        "import sys\nfrom excise.eval.eval_unlearn_technique import ExciseTechnique\n"
        f"technique = ExciseTechnique(folder={str(exported)!r}, num_inference_steps=1, threads=1)\n"
        "assert technique.generate(prompts=['an owl'], seed=None)[0].size == (16, 16)\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'eval_unlearn', 'matplotlib', 'onnx'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_option_is_named_as_the_runtime_names_it() -> None:
    import inspect

    # A guidance is an object, which no configuration file can name.
    runtime = set(inspect.signature(OnnxRuntime.__init__).parameters) - {"self", "name", "guidance"}
    own = {"num_inference_steps", "guidance_scale", "seed", "truncate", "erase_concept"}
    assert set(TechniqueOptions.model_fields) == runtime | own


def test_the_entry_point_is_declared() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"][GROUP] == {NAME: CLASS}


#: Runs the real benchmark's own runner with a metric that keeps what it is given.
REAL_RUN = """
import json, sys
from eval_unlearn.registry import register_metric
from eval_unlearn.runners import SingleBenchmarkRunner
from eval_unlearn.types import Dataset, MetricResult
config = json.loads(sys.argv[1])

@register_metric("kept_modes")
class KeptModes:
    def __init__(self, **options):
        self.modes = []
    def load_dataset(self):
        return [Dataset(prompts, {"source": "a test"}) for prompts in config["batches"]]
    def update(self, images, prompts, metadata):
        assert len(images) == len(prompts)
        self.modes += [image.mode for image in images]
    def compute(self):
        return MetricResult("modes", float(len(self.modes)), {"modes": self.modes})

runner = SingleBenchmarkRunner("excise", "kept_modes", config["technique"], output_dir=config["out"])
assert "eval_unlearn.techniques" not in runner.technique_factory.__module__, runner.technique_factory
report = runner.run()
print("REPORT " + json.dumps([report["metric_result"], report["technique_name"], report["erase_concept"]]))
"""


def test_the_real_benchmark_runs_it(exported: Path, technique: ExciseTechnique, tmp_path: Path) -> None:
    python = os.environ.get("EXCISE_EVAL_UNLEARN_PYTHON") or (sys.executable if find_spec("eval_unlearn") else None)
    if python is None:
        pytest.skip("eval-unlearn isn't installed, and EXCISE_EVAL_UNLEARN_PYTHON names no interpreter that has it")
    config = {
        "batches": [[LONG[0], PROMPTS[0]], PROMPTS[1:]],
        "technique": {"folder": str(exported), "erase_concept": "Gun", "seed": 11, **SETTINGS},
        "out": str(tmp_path),
    }
    # Outside this folder, whose tests and rooms would be found before what is installed there.
    run = subprocess.run(
        [python, "-c", REAL_RUN, json.dumps(config)], capture_output=True, text=True, cwd=tmp_path, timeout=240
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    reported = json.loads(next(line for line in run.stdout.splitlines() if line.startswith("REPORT "))[7:])
    assert reported == [{"name": "modes", "value": 4.0, "details": {"modes": ["RGB"] * 4}}, "excise", "gun"]
    assert "excise: 1 of 2 prompts are too long" in run.stderr
    saved = sorted(tmp_path.glob("excise_kept_modes_*/images/*.png"), key=lambda path: int(path.stem.split("_")[-1]))
    found = pixels([Image.open(path) for path in saved])
    wanted = expected(technique.runtime, [LONG[0], *PROMPTS], 11).astype(int)
    assert np.abs(found - wanted).max() <= 1
