"""Export options: good defaults, and one clear line for everything that is wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from excise.errors import MissingExtra, UsageError
from excise.export.options import ExportOptions, StaticShapes, load_options, make_options


def test_defaults() -> None:
    options = ExportOptions()
    assert (options.dtype, options.vae_dtype, options.opset) == ("fp32", "fp32", None)
    assert options.static is None


def test_a_file_gives_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("format: 1\ndtype: fp16\nopset: 17\nstatic: {height: 512, width: 768}\n")
    wanted = ExportOptions(dtype="fp16", opset=17, static=StaticShapes(batch=1, height=512, width=768))
    assert load_options(path) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no format: start with the line format: 1$"),
        ("[1]", "has no format"),
        ("dtype: fp16", "has no format"),
        ("format: 2", "format 2: Input should be 1$"),
        ("format: 1\ndtype: fp8", "dtype 'fp8': Input should be 'fp32' or 'fp16'$"),
        ("format: 1\nopset: 9", "opset 9: Input should be greater than or equal to 14$"),
        ("format: 1\nopset: '17'", "opset '17': Input should be a valid integer$"),
        ("format: 1\ndtpye: fp16", "dtpye: there is no such option; the options are format, dtype, vae_dtype, opset"),
        ("format: 1\nstatic: {hight: 8}", r"static\.\w+: "),
        ("format: 1\nstatic: {height: 512}", r"static\.width: Field required$"),
        ("format: 1\nstatic: {height: 512, width: 500}", r"static\.width 500: Input should be a multiple of 8$"),
        ("format: [", "isn't YAML: "),
    ],
)
def test_what_is_wrong_is_one_line_with_the_field_and_its_value(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        load_options(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.yaml can't be read"):
        load_options(tmp_path / "nowhere.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="binary can't be read"):
        load_options(tmp_path / "binary")


def test_a_missing_yaml_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(MissingExtra, match=r"pyyaml isn't installed: pip install 'excise\[export\]'"):
        load_options(tmp_path / "options.yaml")


def test_keywords_take_the_place_of_options() -> None:
    options = ExportOptions(opset=18)
    assert make_options(options, dtype="fp16") == ExportOptions(opset=18, dtype="fp16")
    assert make_options(options, dtype=None) == options
    assert make_options() == ExportOptions()
    with pytest.raises(UsageError, match=r"^dtype 'bf16': Input should be 'fp32' or 'fp16'$"):
        make_options(dtype="bf16")


@pytest.mark.parametrize("model", [ExportOptions, StaticShapes])
def test_every_field_has_a_line_of_help(model: type[BaseModel]) -> None:
    for name, field in model.model_fields.items():
        assert field.description, name
        assert "\n" not in field.description
