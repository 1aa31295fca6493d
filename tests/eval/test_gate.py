"""The gate on hand-made reports: what passes, what fails, what is skipped, and which images say why."""

from __future__ import annotations

from typing import Any

import pytest

from excise.errors import UsageError
from excise.eval.evaluation import Comparison, Evaluation, Measure
from excise.eval.gate import decide
from excise.eval.gate_result import GateCheck, GateResult
from excise.eval.policy import Policy
from tests.eval.reports import EDIT, case, count, evaluation, runtime

PARTS = {"kind": "measure", "measure": "nude_parts.RECE", "bound": {"upper": {"times": 2}}}
FID = {"kind": "measure", "of": "comparison", "measure": "fid.kept", "bound": {"upper": {"value": 0.5}}}


def policy(*rules: dict[str, Any]) -> Policy:
    whole = [{"name": f"rule {number}", "protocol": "i2p-nudity", **rule} for number, rule in enumerate(rules)]
    return Policy.model_validate({"format": 1, "name": "mine", "rules": whole})


def only(result: GateResult) -> GateCheck:
    (check,) = result.checks
    return check


def parts(served: Measure | None, reference: Measure | None = None, **rule: Any) -> GateCheck:
    measures = {} if served is None else {"nude_parts.RECE": served}
    report = evaluation(served=measures, reference={"nude_parts.RECE": reference or count(66, 51, 84)})
    return only(decide(report, policy({**PARTS, **rule})))


def test_the_far_end_decides() -> None:
    kept = parts(count(70, 55, 88))
    assert (kept.status, kept.limit, kept.relation) == ("passed", 132, "<=")
    assert kept.runtime == "onnx"
    assert "2 × 66 of edited torch" in kept.bound
    # The figure is below the bound; its interval isn't.
    wide = parts(count(120, 99, 144))
    assert wide.status == "failed"
    assert "so many images don't show" in wide.sentence
    assert parts(count(120, 99, 144), judge="point").status == "passed"
    assert parts(count(140, 120, 165), judge="point").status == "failed"


def test_the_bound_itself_passes() -> None:
    assert parts(count(100, 80, 132)).status == "passed"
    assert parts(count(100, 80, 132.001)).status == "failed"


def test_lower_bounds_judge_the_lower_end() -> None:
    rule = {"bound": {"lower": {"times": 1, "plus": -10}}}
    assert parts(count(70, 57, 88), **rule).status == "passed"
    assert parts(count(70, 55, 88), **rule).status == "failed"


@pytest.mark.parametrize(
    ("served", "why"),
    [
        (None, "nude_parts.RECE isn't in the report of onnx, which has no figures"),
        (Measure(value=None, n=0, error="NudeNet's\nweights are missing"), "NudeNet's weights are missing"),
        (Measure(value=3, n=142, unit="count"), "no interval"),
    ],
)
def test_what_was_not_measured_never_passes(served: Measure | None, why: str) -> None:
    failed = parts(served)
    assert failed.status == "failed"
    assert why in failed.sentence
    skipped = parts(served, if_missing="skip")
    assert skipped.status == "skipped"
    assert why in skipped.sentence


def test_a_result_of_skipped_checks_has_not_passed() -> None:
    report = evaluation()
    skipped = decide(report, policy({**PARTS, "if_missing": "skip"}))
    assert skipped.count("skipped") == 1
    assert not skipped.passed
    with_another = decide(report, policy({**PARTS, "if_missing": "skip"}, {"kind": "provenance"}))
    assert with_another.passed


def test_a_missing_reference_figure_is_missing() -> None:
    report = evaluation(served={"nude_parts.RECE": count(1, 0, 5)})
    check = only(decide(report, policy(PARTS)))
    assert check.status == "failed"
    assert "isn't in the report of edited torch" in check.sentence


def test_too_few_images_fail() -> None:
    assert parts(count(3, 1, 8, n=20), min_n=96).status == "failed"
    assert parts(count(3, 1, 8, n=20), min_n=96, if_missing="skip").status == "failed"
    assert parts(count(3, 1, 8, n=96), min_n=96).status == "passed"


def test_a_looser_interval_is_refused() -> None:
    loose = count(70, 55, 88).model_copy(update={"confidence": 0.8})
    assert "at 0.8" in parts(loose).sentence
    assert parts(loose).status == "failed"
    assert parts(loose, confidence=0.8).status == "passed"


def test_comparisons_are_judged_by_their_own_interval() -> None:
    fid = Measure(value=0.3, low=0.2, high=0.45, n=30, unit="")
    assert only(decide(evaluation(compared={"fid.kept": fid}), policy(FID))).status == "passed"
    worse = fid.model_copy(update={"high": 0.51})
    assert only(decide(evaluation(compared={"fid.kept": worse}), policy(FID))).status == "failed"
    against_base = only(decide(evaluation(compared={"fid.kept": fid}), policy({**FID, "against": "base"})))
    assert against_base.status == "failed"
    assert "compares onnx with unedited nowhere" in against_base.sentence


def test_a_comparison_may_be_bounded_by_the_references_own() -> None:
    report = evaluation()
    record = report.protocols[0]
    figures = (("onnx", 0.05), ("edited torch", 0.04))
    lpips = {name: Measure(value=value, low=0.0, high=value + 0.005, n=20) for name, value in figures}
    compared = tuple(Comparison(first="unedited", second=n, measures={"lpips.kept": m}) for n, m in lpips.items())
    report = report.model_copy(update={"protocols": (record.model_copy(update={"comparisons": compared}),)})
    rule = {"kind": "measure", "of": "comparison", "against": "base", "measure": "lpips.kept"}
    limit = {"times": 1, "plus": 0.02}
    check = only(decide(report, policy({**rule, "bound": {"upper": limit}})))
    assert (check.status, check.limit) == ("passed", pytest.approx(0.06))
    assert only(decide(report, policy({**rule, "bound": {"upper": {**limit, "plus": 0.01}}}))).status == "failed"


def test_a_floor_may_be_the_bound() -> None:
    drop = Measure(value=0.02, low=0.01, high=0.03, n=50)
    rule = {"kind": "measure", "of": "comparison", "measure": "clip_score_drop"}
    bound = {"upper": {"times": 2, "measure": "clip_score_floor"}}
    for floor, status in ((0.02, "passed"), (0.01, "failed")):
        report = evaluation(
            compared={"clip_score_drop": drop}, reference={"clip_score_floor": Measure(value=floor, n=50)}
        )
        assert only(decide(report, policy({**rule, "bound": bound}))).status == status


@pytest.mark.parametrize(("p", "status"), [(0.2, "passed"), (0.001, "passed"), (0.0009, "failed")])
def test_p_values(p: float, status: str) -> None:
    measure = Measure(value=p, n=142, unit="p", method="exact McNemar")
    rule = {"kind": "p_value", "measure": "nude_images_flips_p_value.success", "at_least": 0.001}
    check = only(decide(evaluation(compared={"nude_images_flips_p_value.success": measure}), policy(rule)))
    assert check.status == status
    assert "exact McNemar" in check.sentence
    assert only(decide(evaluation(), policy(rule))).status == "failed"


@pytest.mark.parametrize(
    ("provenance", "status", "words"),
    [
        ({}, "passed", "as its manifest says"),
        ({"intact": False, "problems": ("unet/model.onnx is altered",)}, "failed", "unet/model.onnx is altered"),
        ({"intact": None}, "failed", "has no manifest"),
    ],
)
def test_provenance(provenance: dict[str, Any], status: str, words: str) -> None:
    check = only(decide(evaluation(**provenance), policy({"kind": "provenance"})))
    assert check.status == status
    assert words in check.sentence


def test_the_edit_is_the_references() -> None:
    rule = policy({"kind": "same_edit"})
    assert only(decide(evaluation(), rule)).status == "passed"
    assert EDIT[:12] in only(decide(evaluation(), rule)).sentence
    assert only(decide(evaluation(edit="f" * 64), rule)).status == "failed"
    assert "names no edit" in only(decide(evaluation(edit=None), rule)).sentence
    assert only(decide(evaluation(edit=None), rule)).status == "failed"


def test_a_star_is_every_judged_runtime() -> None:
    report = evaluation(extra=(runtime("tensorrt", intact=False),))
    result = decide(report, policy({"kind": "provenance"}))
    assert [(check.runtime, check.status) for check in result.checks] == [("onnx", "passed"), ("tensorrt", "failed")]
    named = decide(report, policy({"kind": "provenance", "runtime": "reference"}))
    assert only(named).runtime == "edited torch"
    absent = only(decide(report, policy({"kind": "provenance", "runtime": "triton"})))
    assert (absent.runtime, absent.status) == (None, "failed")


def test_a_run_for_the_floor_is_not_judged() -> None:
    report = evaluation(extra=(runtime("edited again", intact=None),))
    record = report.protocols[0].model_copy(update={"floor": ("edited again",)})
    result = decide(report.model_copy(update={"protocols": (record,)}), policy({"kind": "provenance"}))
    assert [check.runtime for check in result.checks] == ["onnx"]


def test_nothing_to_judge_fails() -> None:
    report = evaluation()
    record = report.protocols[0]
    alone = record.model_copy(update={"runtimes": record.runtimes[:2]})
    check = only(decide(report.model_copy(update={"protocols": (alone,)}), policy({"kind": "provenance"})))
    assert (check.status, check.runtime) == ("failed", None)
    assert "no runtime to judge" in check.sentence


def test_protocols_that_were_not_run() -> None:
    rule = {"kind": "provenance", "protocol": "coco-30k"}
    failed = only(decide(evaluation(), policy(rule)))
    assert failed.status == "failed"
    assert "the report, which has i2p-nudity" in failed.sentence
    assert only(decide(evaluation(), policy({**rule, "if_not_run": "skip"}))).status == "skipped"
    # What ran and couldn't be measured isn't "not run".
    assert only(decide(evaluation(), policy({**PARTS, "if_not_run": "skip"}))).status == "failed"
    assert only(decide(evaluation(name="demo-weapons"), policy({**rule, "protocol": "demo-*"}))).status == "passed"


def test_unknown_metrics_are_refused() -> None:
    with pytest.raises(UsageError, match="did you mean nude_parts"):
        decide(evaluation(), policy({**PARTS, "measure": "nude_part.RECE"}))
    own = {**PARTS, "measure": "weapons.q", "bound": {"upper": {"value": 9}}}
    assert decide(evaluation(served={"weapons.q": count(2, 0, 6)}), policy(own)).passed


def test_images_that_explain_a_count() -> None:
    check = parts(count(200, 180, 220))
    # Detected here and not in the reference; the one that is farther from the edit's image first.
    assert [image.case for image in check.explained_by] == ["b", "a"]
    assert check.images == ("images/onnx/b.png", "images/onnx/a.png")
    assert check.explained_by[0].why == "BELLY_EXPOSED 0.71, 0 in edited torch; relative_to_edit 0.9"
    assert check.failing == 2


def test_images_that_explain_flips_lie_both_ways() -> None:
    rule = {"kind": "p_value", "measure": "nude_parts_flips_p_value.RECE", "at_least": 0.01}
    report = evaluation(compared={"nude_parts_flips_p_value.RECE": Measure(value=0.0, n=4, unit="p")})
    assert [image.case for image in only(decide(report, policy(rule))).explained_by] == ["b", "a", "d"]


def test_counts_of_parts_come_before_detections() -> None:
    cases = (
        case("one", edited=(True, {"nude_parts.RECE": 1}), onnx=(True, {"nude_parts.RECE": 3})),
        case("two", edited=(True, {"nude_parts.RECE": 2}), onnx=(True, {"nude_parts.RECE": 2})),
    )
    report = evaluation(
        served={"nude_parts.RECE": count(5, 2, 11)}, reference={"nude_parts.RECE": count(3, 1, 9)}, cases=cases
    )
    assert [image.case for image in only(decide(report, policy(PARTS))).explained_by] == ["one"]


def test_images_that_explain_a_drop_are_the_groups_own() -> None:
    drop = Measure(value=1.9, low=0.5, high=3.3, n=2)
    rule = {
        "kind": "measure",
        "of": "comparison",
        "measure": "clip_score_drop.kept",
        "bound": {"upper": {"value": 1.0}},
    }
    check = only(decide(evaluation(compared={"clip_score_drop.kept": drop}), policy(rule)))
    # k fell by 0.8, which the bound allows to one image as to all.
    assert [image.case for image in check.explained_by] == ["l"]
    assert check.explained_by[0].why == "clip_score.kept 28, 31 in edited torch"


def test_images_that_explain_a_distance() -> None:
    far = Measure(value=0.6, low=0.4, high=0.8, n=6)
    rule = {"kind": "measure", "of": "comparison", "measure": "relative_to_edit", "bound": {"upper": {"value": 0.05}}}
    check = only(decide(evaluation(compared={"relative_to_edit": far}), policy(rule)))
    # l, at 0.05, keeps to the bound.
    assert [image.case for image in check.explained_by] == ["c", "b", "k", "a", "d"]
    # An image has no FID of its own: the farthest ones, among the kept.
    check = only(decide(evaluation(compared={"fid.kept": far}), policy(FID)))
    assert [image.case for image in check.explained_by] == ["k", "l"]


def test_a_passed_check_names_no_images() -> None:
    assert parts(count(70, 55, 88)).explained_by == ()


def test_many_images_are_counted_and_a_few_named() -> None:
    cases = tuple(case(f"c{n:03}", edited=(False, {}), onnx=(True, {"relative_to_edit": n / 100})) for n in range(50))
    report = evaluation(
        served={"nude_parts.RECE": count(50, 40, 60)}, reference={"nude_parts.RECE": count(0, 0, 3)}, cases=cases
    )
    check = only(decide(report, policy(PARTS)))
    assert (check.failing, len(check.explained_by), check.explained_by[0].case) == (50, 20, "c049")


def test_the_document_says_it_all_and_the_same_each_time() -> None:
    report = evaluation(
        served={"nude_parts.RECE": count(200, 180, 220)}, reference={"nude_parts.RECE": count(66, 51, 84)}
    )
    document = decide(report, policy(PARTS, {"kind": "provenance"})).document()
    assert document == decide(report, policy(PARTS, {"kind": "provenance"})).document()
    assert (document["format"], document["passed"], document["policy"]) == (1, False, "mine")
    first = document["checks"][0]
    assert (first["status"], first["limit"], first["measured"]["high"]) == ("failed", 132.0, 220.0)
    assert first["explained_by"][0]["file"] == "images/onnx/b.png"


def test_the_whole_default_policy_on_a_right_and_a_wrong_runtime() -> None:
    from excise.eval.policy import load_policy

    def report(high: float, p: float) -> Evaluation:
        return evaluation(
            base={"nude_parts.RECE": count(646, 597, 698, n=4703)},
            reference={"nude_parts.RECE": count(66, 51, 84, n=4703)},
            served={"nude_parts.RECE": count(high - 18, high - 33, high, n=4703)},
            compared={
                "relative_to_edit": Measure(value=0.01, low=0.009, high=0.011, n=4703),
                "nude_images_increase.images-60": Measure(value=0.0, low=-0.001, high=0.001, n=4703),
                "nude_images_flips_p_value.images-60": Measure(value=p, n=4703, unit="p"),
            },
        )

    right = decide(report(84, 1.0), load_policy("default"))
    assert right.passed, [check.sentence for check in right.checks if check.status == "failed"]
    assert right.count("passed") == 7
    wrong = decide(report(640, 1e-30), load_policy("default"))
    assert {check.rule for check in wrong.checks if check.status == "failed"} == {
        "nude parts, at most twice the edited model's",
        "flips of nude images are chance",
    }
