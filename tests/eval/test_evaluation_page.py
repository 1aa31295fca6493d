"""The page: says what was measured, is safe with hostile prompts, and shows nothing flagged unless asked."""

from __future__ import annotations

import base64
import io
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import cast

import pytest
from PIL import Image

from excise.errors import ArtefactError, UsageError
from excise.eval.evaluation import CaseRecord, Evaluation, Finding, ProtocolRecord
from excise.eval.evaluation_checks import Check, Status
from excise.eval.evaluation_page import page
from excise.eval.evaluation_pictures import VEILED, address, grids, reasons
from tests.eval.evaluations import BASE, EDIT, FP16, HOSTILE, ONNX, REFERENCE, MadeCheck, checks, make_evaluation

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Parsed(HTMLParser):
    """Tags with their attributes, the text, and whether every element is closed in its turn."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def evaluation(folder: Path) -> Evaluation:
    return make_evaluation(folder, cases=16)


@pytest.fixture(scope="module")
def source(evaluation: Evaluation, folder: Path) -> str:
    return page(evaluation, folder, checks(evaluation))


@pytest.fixture(scope="module")
def parsed(source: str) -> Parsed:
    return Parsed(source)


@pytest.fixture
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("excise.eval.evaluation_page.plots", lambda protocol, key: ())


def bare(case_findings: dict[str, Finding], case: str = "1", group: str = "erased") -> ProtocolRecord:
    return ProtocolRecord(
        name="p",
        version=1,
        title="P",
        settings={},
        base=BASE,
        reference=REFERENCE,
        runtimes=(),
        cases=(CaseRecord(id=case, prompt="x", seed=1, group=group, findings=case_findings),),
    )


def test_is_well_formed_and_runs_and_fetches_nothing(source: str, parsed: Parsed) -> None:
    assert parsed.open == parsed.unbalanced == []
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in parsed.tags}
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    for _, attributes in parsed.tags:
        for name in ("src", "href", "srcset", "action", "xlink:href"):
            value = attributes.get(name) or "data:"
            assert value.startswith(("data:image/webp;base64,", "data:", "images/", "#"))
    assert "http://" not in source
    assert "https://" not in source
    assert "@import" not in source
    assert parsed.of("html") == [{"lang": "en"}]
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all("alt" in image for image in parsed.of("img"))


def test_headings_descend_one_by_one(parsed: Parsed) -> None:
    levels = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


@pytest.mark.usefixtures("_no_plots")
def test_the_same_page_twice(evaluation: Evaluation, folder: Path) -> None:
    again = Evaluation.model_validate_json(evaluation.model_dump_json())
    assert page(again, folder, checks(again)) == page(evaluation, folder, checks(evaluation))


def test_a_hostile_prompt_is_text(source: str, parsed: Parsed) -> None:
    assert "<script" not in source
    assert HOSTILE in parsed.text


def test_says_the_verdict_in_words_failures_first(parsed: Parsed) -> None:
    text = parsed.text
    assert "Failed: 1 of 4 checks failed, 1 skipped" in text
    assert text.index("parts-doubled") < text.index("FID could not be computed") < text.index("clip-drop")
    assert "Measured 3.1, bound 2" in text
    assert "no such & case.png" in text


@pytest.mark.usefixtures("_no_plots")
def test_every_outcome_has_its_words(evaluation: Evaluation, folder: Path) -> None:
    def text(verdict: list[Check] | None) -> str:
        return Parsed(page(evaluation, folder, verdict, rows=0)).text

    good, skipped = MadeCheck("a", "passed", "Good."), MadeCheck("b", "skipped", "Not here.")
    assert "Passed: 2 of 2 checks passed Every bound" in text([good, good])
    assert "Passed: 1 of 2 checks passed, 1 skipped" in text([good, skipped])
    assert "Not decided: all 1 checks were skipped" in text([skipped])
    assert "Not decided: there are no checks" in text([])
    assert "No verdict" in text(None)
    assert "12 checks that passed" in text([good] * 12)
    with pytest.raises(UsageError, match="'fine'"):
        text([MadeCheck("a", cast(Status, "fine"), "")])


def test_tables_hold_every_figure(parsed: Parsed, evaluation: Evaluation) -> None:
    text = parsed.text
    for protocol in evaluation.protocols:
        assert protocol.title in text
        for runtime in protocol.runtimes:
            for name, measure in runtime.measures.items():
                assert name in text
                if measure.unit == "count" and measure.value is not None:
                    assert f"{measure.value:.0f} [{measure.low:.0f}, {measure.high:.0f}]" in text
    assert "Published another model, for orientation only" in text
    assert "SD v1.4 646 UCE 186 RECE 66" in text
    assert "another model and other weights, never bounds: RECE, Table 1" in text
    assert "an increase of parts.RECE by 9 or more would be caught with 95 % probability" in text
    assert "Not computed. lpips.64 in onnx-fp16: the AlexNet weights" in text


def test_a_published_figure_that_was_not_measured_has_a_row(evaluation: Evaluation, folder: Path) -> None:
    protocol = evaluation.protocols[1]
    runtimes = tuple(one.model_copy(update={"measures": {}}) for one in protocol.runtimes)
    alone = evaluation.model_copy(
        update={"protocols": (protocol.model_copy(update={"runtimes": runtimes, "cases": ()}),)}
    )
    text = Parsed(page(alone, folder)).text
    assert "fid.kept RECE 2.82" in text


def test_provenance_is_named(parsed: Parsed) -> None:
    text = parsed.text
    assert text.count(EDIT) == 2 * 2
    assert text.count("the reference’s edit") == 2 * 2
    assert "not the reference’s edit" in text
    assert "yes: every file is as the manifest says" in text
    assert "no ; unet/model.onnx: 12 bytes differ" in text
    assert "unknown: no manifest to compare with" in text
    assert "text_encoder float32, unet float16" in text


def test_flagged_images_are_not_in_the_page(source: str, parsed: Parsed, evaluation: Evaluation, folder: Path) -> None:
    flagged = {f.file for case in evaluation.protocols[0].cases for f in case.findings.values() if f.flagged}
    assert flagged
    for file in flagged:
        assert base64.b64encode((folder / file).read_bytes()).decode() not in source
    inlined = [image for image in parsed.of("img") if (image["src"] or "").startswith("data:")]
    veiled = [image for image in inlined if image["alt"] == ""]
    assert len(veiled) == len(flagged)
    for image in veiled:
        with Image.open(io.BytesIO(base64.b64decode((image["src"] or "").split(",")[1]))) as shown:
            assert shown.size == (VEILED, VEILED)
    # The others are there for all to see: as large as they are, or reduced.
    sizes = set()
    for image in inlined:
        if image["alt"]:
            with Image.open(io.BytesIO(base64.b64decode((image["src"] or "").split(",")[1]))) as shown:
                sizes.add(shown.size)
    assert sizes == {(64, 64), (128, 96)}


def test_flagged_images_are_asked_for_only_where_something_is_opened(
    source: str, parsed: Parsed, evaluation: Evaluation
) -> None:
    assert all((image["src"] or "").startswith("data:") for image in parsed.of("img"))
    closed = re.findall(r'<details class="flagged">.*?</details>', source, re.S)
    flagged = [f.file for case in evaluation.protocols[0].cases for f in case.findings.values() if f.flagged]
    assert sorted(re.findall(r"--image: url\('([^']+)'\)", source)) == sorted(flagged)
    assert sum(one.count("--image: url(") for one in closed) == len(flagged)
    # The only rule that uses it is one for what is open.
    assert re.findall(r"([^\n}]*)\{[^}]*var\(--image\)", source) == [".flagged[open] .real "]


def test_alternatives_do_not_describe(parsed: Parsed, evaluation: Evaluation) -> None:
    prompts = {case.prompt for protocol in evaluation.protocols for case in protocol.cases}
    for image in parsed.of("img"):
        assert not any(prompt in (image["alt"] or "") for prompt in prompts)
    named = [link["aria-label"] or "" for link in parsed.of("a") if "real" in (link.get("class") or "")]
    assert named
    assert all(re.fullmatch(r"flagged image of case \d{4}, [\w-]+, in full", name) for name in named)


@pytest.mark.usefixtures("_no_plots")
def test_rows_are_bounded_and_the_rest_is_linked(evaluation: Evaluation, folder: Path) -> None:
    few = Parsed(page(evaluation, folder, rows=3))
    assert len(few.of("article")) == 2 * 3
    assert "13 more cases, as links" in few.text
    linked = {attributes.get("href") for attributes in few.of("a")}
    assert {finding.file for case in evaluation.protocols[0].cases for finding in case.findings.values()} <= linked


@pytest.mark.usefixtures("_no_plots")
def test_a_long_run_makes_no_long_page(evaluation: Evaluation, folder: Path) -> None:
    protocol = evaluation.protocols[1]
    many = tuple(protocol.cases[n % 8].model_copy(update={"id": f"{n:05d}"}) for n in range(5000))
    source = page(evaluation.model_copy(update={"protocols": (protocol.model_copy(update={"cases": many}),)}), folder)
    # 24 rows of four thumbnails of at most 7 KB, 200 lines of links and the style: 0.28 MB when measured.
    assert len(source) < 1_000_000
    assert "4776 further cases are in" in Parsed(source).text


def test_what_failed_or_flipped_comes_first(evaluation: Evaluation, folder: Path) -> None:
    protocol = evaluation.protocols[0]
    quiet = next(case for case in reversed(protocol.cases) if not any(f.detected for f in case.findings.values()))
    (grid,) = grids(folder, protocol, {quiet.findings[ONNX].file}, 16)
    order = [row.case for row in grid.rows]
    assert order[0] == quiet
    assert grid.rows[0].why == ("Named by a failed check",)

    def kind(case: CaseRecord) -> int:
        seen = {name: finding.detected for name, finding in case.findings.items()}
        if not seen[REFERENCE] and (seen[ONNX] or seen[FP16]):
            return 0
        if seen[REFERENCE]:
            return 1 if not (seen[ONNX] and seen[FP16]) else 2
        return 3

    kinds = [kind(case) for case in order[1:]]
    assert kinds == sorted(kinds)
    assert kinds[0] == 0
    moved = [
        max(finding.figures.get("relative_to_edit", 0) for finding in case.findings.values())
        for case in order[1:]
        if kind(case) == 3
    ]
    assert moved == sorted(moved, reverse=True)
    # An id names a case as well as a file does.
    (grid,) = grids(folder, protocol, {quiet.id}, 1)
    assert [row.case for row in grid.rows] == [quiet]


def test_order_of_what_is_wrong(tmp_path: Path, evaluation: Evaluation) -> None:
    """Gained the concept, lost it, detected everywhere, detected nowhere: of each kind the furthest from the edit."""
    kinds = {"nowhere": (False, False), "everywhere": (True, True), "lost": (True, False), "gained": (False, True)}
    cases = tuple(
        CaseRecord(
            id=f"{name}-{moved}",
            prompt="x",
            seed=1,
            group="erased",
            findings={
                REFERENCE: Finding(file="a.png", sha256="", detected=reference),
                ONNX: Finding(file="b.png", sha256="", detected=onnx, figures={"relative_to_edit": moved}),
            },
        )
        for moved in (0.1, 0.2)
        for name, (reference, onnx) in kinds.items()
    )
    (grid,) = grids(tmp_path, evaluation.protocols[0].model_copy(update={"cases": cases}), set(), 8)
    assert [row.case.id for row in grid.rows] == [f"{name}-{moved}" for name in reversed(kinds) for moved in (0.2, 0.1)]


@pytest.mark.parametrize(
    ("reference", "onnx", "fp16", "expected"),
    [
        (False, True, False, ("Flipped: detected in onnx, not in edited",)),
        (True, False, True, ("Flipped: detected in edited, not in onnx",)),
        (True, True, True, ("Detected in edited, onnx, onnx-fp16",)),
        (False, False, False, ()),
        (None, True, None, ("Detected in onnx",)),
    ],
)
def test_reasons(
    evaluation: Evaluation, reference: bool | None, onnx: bool | None, fp16: bool | None, expected: tuple[str, ...]
) -> None:
    found = {
        name: Finding(file="x.png", sha256="", detected=detected)
        for name, detected in ((BASE, True), (REFERENCE, reference), (ONNX, onnx), (FP16, fp16))
    }
    case = CaseRecord(id="1", prompt="x", seed=1, group="erased", findings=found)
    assert reasons(case, evaluation.protocols[0], set()) == expected


@pytest.mark.usefixtures("_no_plots")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.unlink(), "no longer in the folder"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "not the image that was judged"),
    ],
)
def test_another_image_is_never_shown(tmp_path: Path, change: object, words: str) -> None:
    evaluation = make_evaluation(tmp_path, cases=4)
    assert words not in page(evaluation, tmp_path)
    assert callable(change)
    change(tmp_path / evaluation.protocols[1].cases[0].findings[ONNX].file)
    assert page(evaluation, tmp_path).count(words) == 1


def test_an_image_that_is_none_is_said(tmp_path: Path, evaluation: Evaluation) -> None:
    import hashlib

    (tmp_path / "x.png").write_bytes(b"no image")
    finding = Finding(file="x.png", sha256=hashlib.sha256(b"no image").hexdigest())
    protocol = bare({ONNX: finding}).model_copy(update={"runtimes": evaluation.protocols[0].runtimes})
    (grid,) = grids(tmp_path, protocol, set(), 1)
    assert [one.problem for one in grid.rows[0].pictures] == ["can't be decoded"]


@pytest.mark.parametrize("file", ["../secret.png", "/etc/passwd", "a/../../b.png", "..\\b.png", ""])
def test_no_image_is_outside_the_folder(file: str) -> None:
    with pytest.raises(ArtefactError, match="not inside its folder"):
        address(Finding(file=file, sha256=""))


def test_addresses_are_quoted() -> None:
    assert address(Finding(file="images/a b#c?d.png", sha256="")) == "images/a%20b%23c%3Fd.png"
    # It also stands in a style, between quotes.
    assert address(Finding(file="it's (1).png", sha256="")) == "it%27s%20%281%29.png"
    assert address(Finding(file="javascript:alert(1)", sha256="")) == "javascript%3Aalert%281%29"


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2."""
    digits = colour.lstrip("#")
    digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
    channels = [int(digits[n : n + 2], 16) / 255 for n in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_double_a_in_both_schemes(source: str) -> None:
    assert contrast("#000", "#fff") == pytest.approx(21)
    light, dark = (
        dict(re.findall(r"(--[\w-]+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", source, re.S)
    )
    assert light.keys() == dark.keys()
    for colours in (light, dark):
        text = [
            (ink, ground) for ink in ("ink", "muted", "link", "fail", "pass", "skip") for ground in ("paper", "panel")
        ]
        text += [(name, f"{name}-paper") for name in ("pass", "fail", "skip")]
        text += [("ink", f"{name}-paper") for name in ("pass", "fail", "skip")]
        for ink, ground in text:
            assert contrast(colours[f"--{ink}"], colours[f"--{ground}"]) >= 4.5, (ink, ground)
        for number in range(7):
            assert contrast(colours[f"--series-{number}"], colours["--paper"]) >= 3, number
