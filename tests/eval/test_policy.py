"""Policies: what can be said, and one line that names the field for what can't."""

from __future__ import annotations

from pathlib import Path

import pytest

from excise.errors import UsageError
from excise.eval.measure_names import METRICS, unknown_metric
from excise.eval.policy import MeasureRule, Policy, bundled_policies, load_policy, refuse_unknown
from excise.eval.protocol_file import bundled

RULE = """\
  - kind: measure
    name: parts
    protocol: i2p-nudity
    measure: nude_parts.RECE
    bound: {upper: {times: 2}}
"""


def written(folder: Path, rules: str = RULE, head: str = "format: 1\nname: mine\nrules:\n") -> Path:
    path = folder / "policy.yaml"
    path.write_text(head + rules, "utf-8")
    return path


def test_every_example_can_be_said(tmp_path: Path) -> None:
    policy = load_policy(
        written(
            tmp_path,
            RULE
            + """\
  - {kind: measure, name: fid, protocol: coco-30k, of: comparison, measure: fid.kept, bound: {upper: {value: 0.5}}}
  - kind: measure
    name: clip
    protocol: coco-30k
    of: comparison
    measure: clip_score_drop.kept
    bound: {upper: {value: 0.3}}
  - {kind: measure, name: far, protocol: "*", of: comparison, measure: relative_to_edit, bound: {upper: {value: 0.05}}}
  - kind: measure
    name: kept
    protocol: "*"
    runtime: onnx
    measure: recognised.top1
    judge: point
    min_n: 96
    bound: {lower: {times: 1, plus: -2}}
  - kind: measure
    name: noise
    protocol: "*"
    of: comparison
    measure: clip_score_drop
    bound: {upper: {times: 3, measure: clip_score_floor}}
  - {kind: p_value, name: flips, protocol: "*", measure: detected_flips_p_value.top1, at_least: 0.01}
  - {kind: p_value, name: shift, protocol: "*", measure: clip_score_p_value.kept, at_least: 0.001, against: base}
  - {kind: provenance, name: whole, protocol: "*", provenance: intact, if_missing: skip}
  - {kind: same_edit, name: edit, protocol: "*"}
""",
        )
    )
    refuse_unknown(policy)
    parts = policy.rules[0]
    assert isinstance(parts, MeasureRule)
    assert (parts.runtime, parts.against, parts.judge, parts.if_missing) == ("*", "reference", "interval", "fail")
    assert parts.bound.limit.of(66) == 132
    kept = policy.rules[4]
    assert isinstance(kept, MeasureRule)
    assert (kept.bound.side, kept.bound.limit.of(90)) == ("lower", 88)


@pytest.mark.parametrize(
    ("rules", "problem"),
    [
        (RULE.replace("measure: nude", "mesure: nude"), r"yaml:\d+: rules.0.mesure: unknown field: did you mean meas"),
        (RULE.replace("times: 2", "value: 2, times: 2"), "give value, or times and plus"),
        (RULE.replace("times: 2", "value: 2, than: base"), "than and measure are for times and plus"),
        (RULE.replace("upper: {times: 2}", "upper: {value: 1}, lower: {value: 0}"), "either upper or lower"),
        (RULE.replace("{upper: {times: 2}}", "{}"), "either upper or lower"),
        (RULE.replace("times: 2", "value: .inf"), r"rules.0.bound.upper.value: inf: give a number"),
        (RULE.replace("times: 2", "value: lots"), "rules.0.bound.upper.value: 'lots': give a number"),
        (RULE.replace("kind: measure", "kind: measured"), "give one of measure, p_value, provenance, same_edit"),
        (RULE + RULE, "'parts' is another rule's name"),
        (RULE + "    of: comparision\n", "give runtime or comparison"),
        (RULE + "    on: interval\n", "'on' is no field's name"),
        (RULE + "    min_n: 0\n", "whole number of at least 1"),
        (RULE + "    if_missing: pass\n", "give fail or skip"),
        ("  - {kind: p_value, name: x, protocol: '*', measure: flips, at_least: 0.1}\n", "ends with _p_value"),
        ("  - {kind: p_value, name: x, protocol: '*', measure: q_flips_p_value, at_least: 1}\n", "between 0 and 1"),
    ],
)  # fmt: skip
def test_what_can_not_be_said_is_one_line(tmp_path: Path, rules: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem) as caught:
        load_policy(written(tmp_path, rules))
    assert "\n" not in str(caught.value)


def test_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="format: 2: give 1, the only format"):
        load_policy(written(tmp_path, head="format: 2\nname: mine\nrules:\n"))
    with pytest.raises(UsageError, match="at least one"):
        load_policy(written(tmp_path, "", head="format: 1\nname: mine\nrules: []\n"))


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"doesn't exist: name a file, or one of default, demo"):
        load_policy(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="can't be read"):
        load_policy(tmp_path)
    (tmp_path / "odd.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="UTF-8"):
        load_policy(tmp_path / "odd.yaml")


def named(measure: str, bound: str = "{upper: {value: 1}}") -> Policy:
    rule = {"kind": "measure", "name": "x", "protocol": "*", "measure": measure}
    limit = {"upper": {"times": 1, "measure": bound}} if "{" not in bound else {"upper": {"value": 1}}
    return Policy.model_validate({"format": 1, "name": "mine", "rules": [{**rule, "bound": limit}]})


def test_an_unknown_metric_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(UsageError, match="rule 'x': no metric is named 'nude_prats': did you mean nude_parts"):
        refuse_unknown(named("nude_prats.RECE"))
    with pytest.raises(UsageError, match=r"there are clip_score, .*psnr.*, and these with _flips"):
        refuse_unknown(named("zzz"))
    with pytest.raises(UsageError, match="'clip_scores_floor': did you mean clip_score_floor"):
        refuse_unknown(named("clip_score", "clip_scores_floor"))


def test_a_reports_own_names_are_known() -> None:
    own = named("weapons_increase.q")
    with pytest.raises(UsageError, match="weapons"):
        refuse_unknown(own)
    refuse_unknown(own, ["weapons.q"])


def test_protocols_name_metrics_that_policies_know() -> None:
    for protocol in bundled():
        for name in protocol.measures():
            assert unknown_metric(name) is None, name


@pytest.mark.parametrize("name", bundled_policies())
def test_bundled_policies_ask_for_figures_that_protocols_have(name: str) -> None:
    policy = load_policy(name)
    refuse_unknown(policy)
    figures = {protocol.name: set(protocol.measures()) for protocol in bundled()}
    for rule in policy.rules:
        if not isinstance(rule, MeasureRule) or rule.protocol not in figures:
            continue
        metric, _, variant = rule.measure.partition(".")
        metric = metric.removesuffix("_increase").removesuffix("_drop")
        assert f"{metric}.{variant}" in figures[rule.protocol], rule.name


def test_metrics_are_described() -> None:
    assert all(METRICS.values())
    assert {"nude_parts", "detected_flips_p_value", "clip_score_drop", "relative_to_edit"} <= set(METRICS)
