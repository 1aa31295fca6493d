"""JUnit XML, parsed back: one case a check, whatever characters its words have."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from excise.eval.gate_result import FailingImage, GateCheck, GateResult, Status
from excise.eval.junit import junit_xml


def check(rule: str, status: Status, protocol: str = "i2p-nudity", runtime: str | None = "onnx") -> GateCheck:
    images = tuple(FailingImage(case=f"c{n}", file=f"images/onnx/c{n}.png", why="detected") for n in range(2))
    return GateCheck(
        name=f"{protocol}, {runtime}: {rule}",
        rule=rule,
        protocol=protocol,
        runtime=runtime,
        bound="at most 132",
        status=status,
        sentence=f"A sentence of {rule}.",
        failing=3 if status == "failed" else 0,
        explained_by=images if status == "failed" else (),
    )


def parsed(*checks: GateCheck) -> ElementTree.Element:
    return ElementTree.fromstring(junit_xml(GateResult(policy="mine", checks=checks)))


def test_every_check_is_a_case_in_its_protocols_suite() -> None:
    root = parsed(
        check("parts", "failed"), check("edit", "passed"), check("fid", "skipped", "coco-30k"), check("clip", "passed")
    )
    assert root.tag == "testsuites"
    assert {key: root.get(key) for key in ("tests", "failures", "skipped", "errors")} == {
        "tests": "4",
        "failures": "1",
        "skipped": "1",
        "errors": "0",
    }
    suites = {suite.get("name"): suite for suite in root}
    assert set(suites) == {"i2p-nudity", "coco-30k"}
    cases = suites["i2p-nudity"].findall("testcase")
    assert [case.get("name") for case in cases] == ["parts [onnx]", "edit [onnx]", "clip [onnx]"]
    assert [case.get("classname") for case in cases] == ["i2p-nudity"] * 3
    failure = cases[0].find("failure")
    assert failure is not None
    assert failure.get("message") == "A sentence of parts."
    assert failure.get("type") == "at most 132"
    assert failure.text is not None
    assert failure.text.splitlines()[1:] == [
        "images/onnx/c0.png: detected",
        "images/onnx/c1.png: detected",
        "and 1 images more",
    ]
    assert cases[1].find("failure") is None
    skipped = suites["coco-30k"].find("testcase/skipped")
    assert skipped is not None
    assert skipped.get("message") == "A sentence of fid."


@pytest.mark.parametrize("name", ['<b> & "quotes" \'', "]]>", "café — 色", "a\nb"])
def test_words_survive(name: str) -> None:
    case = parsed(check(name, "failed")).find("testsuite/testcase")
    assert case is not None
    assert case.get("name") == f"{name} [onnx]"
    failure = case.find("failure")
    assert failure is not None
    assert failure.text is not None
    assert failure.text.startswith(f"A sentence of {name}.")


def test_what_xml_can_not_hold_is_replaced() -> None:
    case = parsed(check("bell \x07, escape \x1b, nul \x00, lone \ud800, last \uffff", "passed", runtime=None))
    assert (
        case.find("testsuite/testcase").get("name")
        == "bell \ufffd, escape \ufffd, nul \ufffd, lone \ufffd, last \ufffd"
    )  # type: ignore[union-attr]


def test_the_same_result_gives_the_same_bytes() -> None:
    result = GateResult(policy="mine", checks=(check("parts", "failed"),))
    assert junit_xml(result) == junit_xml(result)
    assert junit_xml(result).startswith(b"<?xml version='1.0' encoding='utf-8'?>\n")
