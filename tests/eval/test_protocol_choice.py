"""What the user chose of a protocol is what is run, and what the report says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from excise.errors import UsageError
from excise.eval.protocol_choice import Choice
from excise.eval.protocol_file import load_protocol
from excise.eval.protocol_models import ProtocolModels
from excise.eval.protocol_sample import limit, sample
from excise.eval.runtime_spec import RuntimeSpec
from tests.eval.evaluated_runs import PROTOCOL, clip_models, written_protocol


def test_fewer_cases_and_other_steps_are_run_and_told() -> None:
    protocol = load_protocol("demo-weapons")
    plain = Choice(protocol)
    everything = plain.all_cases()
    assert plain.cases(everything) == everything
    assert plain.steps == 25
    assert plain.settings()["chosen"] == {}
    chosen = Choice(protocol, sample=20, sample_seed=3, limit=15, num_inference_steps=2, own_scheduler=True)
    assert chosen.cases(everything) == limit(sample(everything, 20, 3), 15)
    assert chosen.steps == 2
    settings = chosen.settings()
    assert settings["chosen"] == {"limit": 15, "sample": 20, "sample_seed": 3}
    assert settings["sampling"]["num_inference_steps"] == 2
    assert settings["sampling"]["scheduler"] == "each model's own"
    # Nothing of it sticks to the protocol.
    assert plain.settings()["sampling"] == {
        **settings["sampling"],
        "num_inference_steps": 25,
        "scheduler": "DDIMScheduler",
    }
    json.dumps(settings, allow_nan=False)


def test_own_sizes_are_told_of_a_protocol_that_has_others() -> None:
    assert Choice(load_protocol("i2p-nudity"), own_size=True).settings()["sampling"]["size"] == "each model's own"
    assert "size" not in Choice(load_protocol("i2p-nudity")).settings()["sampling"]
    assert "size" not in Choice(load_protocol("demo-weapons"), own_size=True).settings()["sampling"]


def test_parameters_choose_the_groups() -> None:
    choice = Choice(load_protocol("demo-object"), parameters={"erased": "gun"})
    cases = choice.all_cases()
    assert {case.label for case in cases if case.group == "erased"} == {"gun"}
    assert choice.settings()["parameters"] == {"erased": "gun"}
    with pytest.raises(UsageError, match="needs to know what was erased: give --set erased=LABEL"):
        Choice(load_protocol("demo-object")).all_cases()


def test_another_scheduler_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "scheduler"
    place.mkdir()
    (place / "scheduler_config.json").write_text('{"_class_name": "PNDMScheduler", "num_train_timesteps": 1000}')
    spec = RuntimeSpec("served", "onnx", str(tmp_path))
    choice = Choice(load_protocol("demo-weapons"))
    with pytest.raises(UsageError, match=r"demo-weapons samples with DDIMScheduler, and .* with PNDMScheduler: put"):
        choice.check_scheduler(spec)
    Choice(load_protocol("demo-weapons"), own_scheduler=True).check_scheduler(spec)
    # A server's can't be seen.
    choice.check_scheduler(RuntimeSpec("served", "openai", "http://localhost:1"))


def test_rules_are_checked_against_what_detectors_know(tmp_path: Path) -> None:
    choice = Choice(load_protocol(written_protocol(tmp_path)))
    choice.check_rules(clip_models(), choice.all_cases())
    deep = Choice(load_protocol(written_protocol(tmp_path / "deep", PROTOCOL.replace("top: 2", "top: 5"))))
    with pytest.raises(UsageError, match="grey, rule top2 asks for the 5 best labels, and clip names 4"):
        deep.check_rules(clip_models(), deep.all_cases())
    with pytest.raises(UsageError, match="grey: clip chooses between the prompts' labels, of which there are 1"):
        choice.check_rules(clip_models(), choice.all_cases()[:3])


def test_a_misspelt_class_of_nudenet_is_found_before_anything_runs(tmp_path: Path) -> None:
    """It would never be counted, and so pass every bound."""
    text = (
        "format: 1\nname: feet\nversion: 1\ntitle: Feet\nprompts: {source: file, file: grey.csv}\ngroups: {all: kept}\n"
        "detectors: [{name: nudenet, version: '3', model: 320n}]\n"
        "rules: [{name: feet, kind: boxes, classes: [FEET_EXPOSE], threshold: 0.6, count: image}]\n"
    )
    choice = Choice(load_protocol(written_protocol(tmp_path, text)))
    with pytest.raises(UsageError, match="feet, rule feet counts FEET_EXPOSE, which the detector doesn't know"):
        choice.check_rules(ProtocolModels({}), choice.all_cases())


def test_a_sweep_is_named_or_given_values_and_told() -> None:
    protocol = load_protocol("demo-weapons")
    sweep = protocol.sweep("epochs")
    assert list(sweep.runtimes) == [f"epochs-{n}" for n in range(6)]
    assert protocol.sweep("ridge=1e-3,10").runtimes == {"ridge-0.001": 0.001, "ridge-10": 10}
    told = Choice(protocol, sweep=sweep).settings()
    assert told["sweep"] == {"preset": "weapons", "parameter": "epochs", "values": [0, 1, 2, 3, 4, 5]}
    assert "sweep" not in Choice(protocol).settings()
    assert "sweeps" not in told


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ("lambda", "demo-weapons has no sweep lambda: choose one of epochs, ridge"),
        ("epochs=1", "values"),
        ("epochs=1,x", "give numbers, such as epochs=1,2"),
        ("epochs=1,1.5", "epochs are whole numbers from 0 to 1000"),
        ("epochs=1,nan", "values"),
        ("ridge=0,1", "λ is a positive number"),
        ("ridge=1,1.00000001", "each value stands once"),
    ],
)
def test_a_sweep_that_cannot_run_is_refused(asked: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        load_protocol("demo-weapons").sweep(asked)


def test_a_protocol_without_sweeps_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no sweep epochs: it has none"):
        load_protocol(written_protocol(tmp_path)).sweep("epochs")
