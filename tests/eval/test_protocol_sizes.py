"""Sizes that prompts ask for: runtimes that can't make them are refused before anything is made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from excise.errors import UsageError
from excise.eval.cases import Case
from excise.eval.image_file import image_size
from excise.eval.protocol_choice import Choice
from excise.eval.protocol_file import load_protocol
from excise.eval.protocol_sizes import check_sizes, sizes_in_words
from excise.eval.runtime_spec import RuntimeSpec
from excise.serve.runtime import Request
from tests.eval.evaluated_runs import PROTOCOL, Painter, start, written_protocol

#: Two images of the protocol's own size, and two of each of two others.
SIZED = PROTOCOL.replace("label: label, id: id", "label: label, id: id, width: w, height: h").replace(
    "guidance_scale: 2", "guidance_scale: 2, width: 16, height: 16"
)
SIDES = ((16, 16), (24, 8), (8, 24))


class AnySize(Painter):
    """Paints in the size that is asked for."""

    def _painted(self, request: Request) -> npt.NDArray[np.uint8]:
        image = super()._painted(request)
        height, width = request.height or self.size, request.width or self.size
        return np.resize(image, (height, width, 3))


def sized_protocol(folder: Path) -> Path:
    path = written_protocol(folder, SIZED)
    lines = (folder / "grey.csv").read_text().splitlines()
    rows = [f"{line},{SIDES[n % 3][0]},{SIDES[n % 3][1]}" for n, line in enumerate(lines[1:])]
    (folder / "grey.csv").write_text("\n".join([f"{lines[0]},w,h", *rows]) + "\n")
    return path


def made(kind: type[Painter] = AnySize) -> dict[str, Painter]:
    return {
        "base": kind("base"),
        "edited": kind("edited", lost=("Gun", "knife")),
        "served": kind("served", lost=("Gun", "knife"), noise=1),
    }


def export(folder: Path, *, shape: tuple[str | int, ...] = (2, 4, "h", "w")) -> RuntimeSpec:
    """What is read of an export of 64 x 64 images, whose latents the VAE doubles and the UNet halves twice."""
    onnx = pytest.importorskip("onnx")
    for part, config in (
        ("unet", {"in_channels": 4, "sample_size": 16, "block_out_channels": [1, 1, 1]}),
        ("vae_decoder", {"latent_channels": 4, "block_out_channels": [1, 1, 1]}),
    ):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
        latents = onnx.helper.make_tensor_value_info("sample", onnx.TensorProto.FLOAT, shape)
        node = onnx.helper.make_node("Identity", ["sample"], ["out"])
        out = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, shape)
        graph = onnx.helper.make_graph([node], "graph", [latents], [out])
        onnx.save(onnx.helper.make_model(graph), folder / part / "model.onnx")
    return RuntimeSpec("served", "onnx", str(folder), source=f"onnx:{folder.name}")


def cases(*sizes: tuple[int, int] | None) -> list[Case]:
    return [Case(str(n), "a cat", 0, 5.0, height=s and s[0], width=s and s[1]) for n, s in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ((64, None), "case 1: width None and height 64: give both or neither"),
        ((None, 64), "give both or neither"),
        ((60, 64), "case 1: 64 x 60 pixels: give multiples of 8"),
        ((0, 64), "give multiples of 8"),
    ],
)
def test_a_cases_sides(sides: tuple[int | None, int | None], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Case("1", "a cat", 0, 5.0, height=sides[0], width=sides[1])
    assert Case("1", "a cat", 0, 5.0).size is None
    assert Case("1", "a cat", 0, 5.0, height=64, width=128).size == (64, 128)


def test_sizes_in_words() -> None:
    assert sizes_in_words([(8, 16)] * 3) == "16 x 8"
    assert sizes_in_words([(8, 16), (16, 8), (16, 8)]) == "8 x 16 (2), 16 x 8 (1)"


def test_an_exports_shapes_decide(tmp_path: Path) -> None:
    free, fixed = export(tmp_path / "free"), export(tmp_path / "fixed", shape=(2, 4, 16, 16))
    for spec in (free, fixed):
        check_sizes("p", cases(None, None), spec)
        check_sizes("p", cases((64, 64), None), spec)
    check_sizes("p", cases((64, 128), (48, 32)), free)
    message = "p asks for 2 images of 128 x 64, 32 x 48 pixels, and served=onnx:fixed is one which was exported for "
    with pytest.raises(UsageError, match=f"{message}images of 64 x 64 pixels alone: give --image-size own"):
        check_sizes("p", cases((64, 128), (48, 32), (64, 64)), fixed)
    with pytest.raises(UsageError, match=r"p asks for 1 images of 72 x 64 pixels, .* sides are multiples of 16 pixels"):
        check_sizes("p", cases((64, 72), (64, 128)), free)


def test_a_triton_model_makes_one_size() -> None:
    triton = RuntimeSpec("s", "triton", "http://host/sd", source="triton:http://host/sd")
    check_sizes("p", cases((64, 64), (64, 64)), triton)
    with pytest.raises(UsageError, match=r"p asks for 2 images of 64 x 64, 128 x 64 pixels, .* model takes no size"):
        check_sizes("p", cases((64, 64), (64, 128)), triton)
    # What a server of OpenAI's API or PyTorch is asked for, it makes or refuses.
    for kind in ("openai", "torch"):
        check_sizes("p", cases((64, 64), (64, 128)), RuntimeSpec("s", kind, "http://host"))  # type: ignore[arg-type]


def test_every_image_has_the_size_that_its_prompt_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtimes = made()
    started = start(tmp_path / "run", sized_protocol(tmp_path), monkeypatch, made=runtimes)
    (record,) = started.evaluation.protocols
    for number, case in enumerate(record.cases):
        width, height = SIDES[number % 3]
        for finding in case.findings.values():
            assert image_size(tmp_path / "run" / finding.file) == (height, width)
    assert record.settings["image_sizes"] == dict.fromkeys(runtimes, "16 x 16 (4), 24 x 8 (4), 8 x 24 (4)")
    assert not any("pixels" in line for line in started.said)
    # Four images of a size are one batch of four.
    assert [one.calls for one in runtimes.values()] == [3, 3, 3]
    # A finished run is gone on with: nothing is drawn, and the report is the same.
    again = made()
    resumed = start(tmp_path / "run", tmp_path / "grey.yaml", monkeypatch, made=again)
    assert [one.calls for one in again.values()] == [0, 0, 0]
    assert resumed.report == started.report


def test_own_sizes_are_taken_where_that_is_chosen_and_the_report_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sized_protocol(tmp_path)
    started = start(tmp_path / "run", path, monkeypatch, made=made(), own_size=True)
    (record,) = started.evaluation.protocols
    assert record.settings["image_sizes"]["served"] == "8 x 8"
    assert record.settings["sampling"]["size"] == "each model's own"
    said = "grey: images of 16 x 16 (4), 24 x 8 (4), 8 x 24 (4) pixels are asked for, and all are made in each "
    assert f"{said}model's own size" in started.said
    assert "size" not in Choice(load_protocol(path)).settings()["sampling"]


def test_a_runtime_that_ignores_the_size_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from excise.errors import ArtefactError

    with pytest.raises(ArtefactError, match="made images of 8 × 8 pixels, and case Gun-0 asks for 16 × 16: give --im"):
        start(tmp_path / "run", sized_protocol(tmp_path), monkeypatch, made=made(Painter))
    assert not list((tmp_path / "run").rglob("*.png"))
