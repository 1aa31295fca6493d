"""A gate's result as JUnit XML, which continuous integration shows: one test case a check, one suite a protocol.

``xml.etree.ElementTree`` writes and escapes it. XML 1.0 can't hold most control characters at all; they become U+FFFD.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree

from excise.eval.gate_result import GateCheck, GateResult

#: What is no character of XML 1.0 (W3C recommendation, § 2.2).
_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit_xml(result: GateResult) -> bytes:
    """The document, UTF-8 with its declaration; the same result gives the same bytes."""
    root = ElementTree.Element("testsuites", _counts(result.checks, f"excise gate: {result.policy}"))
    for protocol in dict.fromkeys(check.protocol for check in result.checks):
        checks = tuple(check for check in result.checks if check.protocol == protocol)
        suite = ElementTree.SubElement(root, "testsuite", _counts(checks, protocol))
        for check in checks:
            _case(suite, check)
    ElementTree.indent(root)
    xml: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return xml + b"\n"


def _case(suite: ElementTree.Element, check: GateCheck) -> None:
    name = check.rule if check.runtime is None else f"{check.rule} [{check.runtime}]"
    case = ElementTree.SubElement(suite, "testcase", _clean({"classname": check.protocol, "name": name, "time": "0"}))
    text = "\n".join([check.sentence, *(f"{image.file}: {image.why}" for image in check.explained_by)])
    if check.failing > len(check.explained_by):
        text += f"\nand {check.failing - len(check.explained_by)} images more"
    if check.status == "failed":
        failure = {"message": check.sentence, "type": check.bound}
        ElementTree.SubElement(case, "failure", _clean(failure)).text = _printable(text)
    elif check.status == "skipped":
        ElementTree.SubElement(case, "skipped", _clean({"message": check.sentence}))
    else:
        ElementTree.SubElement(case, "system-out").text = _printable(text)


def _counts(checks: tuple[GateCheck, ...], name: str) -> dict[str, str]:
    count = {status: sum(check.status == status for check in checks) for status in ("failed", "skipped")}
    return _clean(
        {
            "name": name,
            "tests": str(len(checks)),
            "failures": str(count["failed"]),
            "errors": "0",
            "skipped": str(count["skipped"]),
            "time": "0",
        }
    )


def _clean(attributes: dict[str, str]) -> dict[str, str]:
    return {key: _printable(value) for key, value in attributes.items()}


def _printable(text: str) -> str:
    return _NO_XML.sub("\ufffd", text)
