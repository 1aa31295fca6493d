"""Which models an attack is between."""

from __future__ import annotations

from pathlib import Path

import pytest

from excise.errors import ModelError, UsageError
from excise.eval.attack_specs import attack_specs


def sources(*arguments: object) -> tuple[str, str]:
    base, attacked = attack_specs(*arguments)  # type: ignore[arg-type]
    assert (base.name, attacked.name) == ("base", "attacked")
    return str(base), str(attacked)


def test_the_base_is_the_model_without_what_erases(tmp_path: Path) -> None:
    edit = tmp_path / "my edit.safetensors"
    demo = "torch:demo:model"
    assert sources("demo:model", None, None) == (demo, demo)
    assert sources("demo:model", edit, None) == (demo, f"{demo}?edit={str(edit).replace(' ', '+')}")
    assert attack_specs("demo:model", edit, None)[1].options == {"edit": str(edit)}
    assert sources("demo:model?sld=medium&dtype=float16", None, None) == (
        f"{demo}?dtype=float16",
        f"{demo}?sld=medium&dtype=float16",
    )
    (tmp_path / "esd").mkdir()
    own = str(tmp_path / "esd")
    assert sources(own, None, "demo:model", "cuda") == (f"{demo}?device=cuda", f"torch:{own}?device=cuda")


def test_refusals(tmp_path: Path) -> None:
    for served in ("onnx:somewhere", "openai:http://localhost:1", "triton:http://localhost:1/m"):
        with pytest.raises(UsageError, match="has no gradients to attack with: name the diffusers folder"):
            attack_specs(served, None, None)
        with pytest.raises(UsageError, match="has no gradients"):
            attack_specs("demo:model", None, served)
    with pytest.raises(UsageError, match="device is given by --device too"):
        attack_specs("demo:model?device=cuda:1", None, None, "cuda")
    with pytest.raises(UsageError, match="edit is given by --edit too"):
        attack_specs("demo:model?edit=a", Path("b"), None)
    with pytest.raises(UsageError, match="torch has no option 'guidance'"):
        attack_specs("demo:model?guidance=1", None, None)
    with pytest.raises(ModelError, match="is not a folder"):
        attack_specs(str(tmp_path / "none"), None, None)
