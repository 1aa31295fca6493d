"""A protocol as a YAML file: what is generated, what counts, and which published figures stand beside.

A protocol is fixed before anything runs. ``excise eval`` takes a bundled one by name (``eval/protocols``) or a file of
the user's; ``settings`` of it go into the report, so that two reports can be told apart by what they measured.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from excise.demo.vocabulary import article
from excise.errors import UsageError
from excise.eval.cases import ERASED, KEPT, Case
from excise.eval.evaluation import PaperFigure
from excise.eval.prompt_file import PromptRow, read_prompt_file
from excise.eval.protocol_demo import BUILTIN
from excise.eval.protocol_hub import hub_file
from excise.eval.protocol_schema import (
    AnyKindOfRule,
    AnyRule,
    BuiltinPrompts,
    Detector,
    Groups,
    HubPrompts,
    Metric,
    Name,
    Part,
    Prompts,
    Published,
    Sampling,
    Sweep,
    TablePrompts,
    Whole,
)
from excise.eval.protocol_yaml import Problem, parse_yaml, validated
from excise.manifest import first_problem
from excise.named_file import read_named
from excise.printable import printable, short
from excise.strict_yaml import LIMIT

_PROTOCOLS = Path(__file__).resolve().parent / "protocols"

#: Of a protocol, what no figure depends on.
_TOLD = {"format": True, "name": True, "version": True, "title": True, "note": True, "paper": True, "sweeps": True}


class ProtocolFile(Part):
    """One protocol, as its file has it."""

    format: Literal[1] = Field(description="1, the only format there is")
    name: Name = Field(description="letters, digits, - and _")
    version: Whole = Field(ge=1, description="a whole number, raised whenever figures may change")
    title: str = Field(min_length=1, description="text on one line")
    note: str = Field(default="", description="text: what is known of the published protocol, and what differs")
    prompts: Prompts = Field(description="fields, of which source is file, hub or builtin")
    groups: Groups = Field(description="all, erased or kept; or erased, a list of labels or chosen")
    sampling: Sampling = Field(default=Sampling(), description="steps, guidance and scheduler")
    detectors: tuple[Detector, ...] = Field(default=(), description="a list of detectors")
    rules: tuple[AnyKindOfRule, ...] = Field(default=(), description="a list of counting rules")
    metrics: tuple[Metric, ...] = Field(default=(), description="a list of metrics")
    paper: tuple[Published, ...] = Field(default=(), description="a list of published figures")
    sweeps: dict[Name, Sweep] = Field(default={}, description="ablations by name: preset, parameter and values")
    _folder: Path | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _consistent(self) -> ProtocolFile:
        if isinstance(self.prompts, TablePrompts) and self.groups.erased and not self.prompts.columns.label:
            raise Problem(("groups", "erased"), "goes by labels: name their column, prompts.columns.label")
        names = [detector.name for detector in self.detectors]
        if len(set(names)) < len(names):
            raise Problem(("detectors",), "one of a kind: each name stands once")
        seen: set[str] = set()
        for number, rule in enumerate(self.rules):
            if isinstance(rule, AnyRule):
                if unknown := sorted(set(rule.any_of) - seen):
                    raise Problem(("rules", number, "any_of"), f"no rule before it is named {unknown[0]}")
            elif rule.detector not in names and (rule.detector is not None or len(names) != 1):
                raise Problem(("rules", number, "detector"), f"give one of {', '.join(names) or 'the detectors'}")
            if rule.name in seen:
                raise Problem(("rules", number, "name"), f"{rule.name} is another rule's name")
            seen.add(rule.name)
        measures = self.measures()
        if repeated := sorted({measure for measure in measures if measures.count(measure) > 1}):
            raise Problem((), f"two figures are named {repeated[0]}: name rules and variants apart")
        for number, figure in enumerate(self.paper):
            if figure.measure not in measures:
                close = difflib.get_close_matches(figure.measure, measures, n=1)
                hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(measures) or 'none'}"
                raise Problem(("paper", number, "measure"), f"no figure is named {short(figure.measure)}: {hint}")
        return self

    @property
    def parameters(self) -> Mapping[str, str]:
        """What ``--set`` takes, and what it means."""
        return {"erased": "label whose prompts were erased, or several with commas"} if self._chooses else {}

    @property
    def _chooses(self) -> bool:
        return self.groups.erased == "chosen"

    def cases(self, prompts: Path | None = None, chosen: Mapping[str, str] | None = None) -> tuple[Case, ...]:
        """Every case, in the order of the file or vocabulary.

        Args:
            prompts: the file of prompts, or a folder that holds it under its usual name. None is the file beside a
                user's own protocol file, or the hub's where that names a data set.
            chosen: the run's parameters, as ``--set NAME=VALUE`` gives them.

        Raises:
            UsageError: prompts that are missing, can't be read or aren't taken; a parameter that is missing or unknown;
                an erased label that no prompt has; a prompt's id that can't name a file.

        Warns:
            PromptEncodingWarning: the file isn't UTF-8.
        """
        self._check(chosen or {})
        if isinstance(self.prompts, BuiltinPrompts):
            if prompts is not None:
                raise UsageError(f"{self.name} has its own prompts: leave {printable(prompts)} out")
            subjects = BUILTIN[self.prompts.builtin]()
            erased = self._erased([subject.label for subject in subjects], chosen or {})
            counts = {ERASED: self.prompts.images.erased, KEPT: self.prompts.images.kept}
            return tuple(
                Case(f"{one.name}-{seed}", one.prompt, seed, self.sampling.guidance_scale, group, one.label)
                for one in subjects
                for group in (self._group(one.label, erased),)
                for seed in one.seeds(counts[group])
            )
        path = self._prompt_path(self.prompts, prompts)
        rows = read_prompt_file(
            path,
            self.prompts.columns,
            duplicate_ids=self.prompts.duplicate_ids,
            empty_prompts=self.prompts.empty_prompts,
        )
        erased = self._erased([row.label for row in rows], chosen or {})
        return tuple(self._case(self.prompts, row, self._group(row.label, erased), path) for row in rows)

    def sweep(self, asked: str) -> Sweep:
        """One of the ablations, ``NAME``; or ``NAME=VALUE,VALUE,…`` with other values.

        Raises:
            UsageError: there is none of that name, or a value that it doesn't take.
        """
        name, equals, texts = asked.partition("=")
        if name not in self.sweeps:
            there = f"choose one of {', '.join(self.sweeps)}" if self.sweeps else "it has none"
            raise UsageError(f"{self.name} has no sweep {printable(name)}: {there}")
        sweep = self.sweeps[name]
        if not equals:
            return sweep
        try:
            values = [float(text) for text in texts.split(",")]
        except ValueError as error:
            raise UsageError(f"--sweep {printable(asked)}: give numbers, such as {name}=1,2") from error
        try:
            return Sweep.model_validate({**sweep.model_dump(), "values": values})
        except ValidationError as error:
            raise UsageError(f"--sweep {printable(asked)}: {first_problem(error)}") from error

    def measures(self) -> tuple[str, ...]:
        """The names of all figures that the protocol asks for."""
        return tuple(measure for one in (*self.rules, *self.metrics) for measure in one.measures())

    def figures(self, chosen: Mapping[str, str] | None = None) -> tuple[PaperFigure, ...]:
        """The published figures that hold for a run with these parameters."""
        given = {name: value.casefold() for name, value in (chosen or {}).items()}
        return tuple(
            one.figure()
            for one in self.paper
            if all(given.get(name, "").strip() == value.casefold() for name, value in one.when.items())
        )

    def settings(self, chosen: Mapping[str, str] | None = None) -> dict[str, Any]:
        """All that the figures depend on but the prompts, as JSON: for the report, and to tell two runs apart."""
        document = self.model_dump(mode="json", exclude={**_TOLD, "prompts": {"where", "file", "count"}})
        return {**document, "parameters": dict(sorted((chosen or {}).items()))}

    def label_prompts(self, cases: Sequence[Case], detector: Detector) -> dict[str, tuple[str, ...]]:
        """Label → what a CLIP knows it by, for all labels of ``cases``, in their order.

        Give it every case of the protocol, also for a run with fewer: what it chooses from decides what it sees.
        """
        return {
            label: tuple(
                text.replace("{a}", article(label)).replace("{label}", label) for text in detector.label_prompts
            )
            for label in dict.fromkeys(case.label for case in cases if case.label)
        }

    def _check(self, chosen: Mapping[str, str]) -> None:
        if unknown := sorted(set(chosen) - set(self.parameters)):
            takes = f"it takes {', '.join(self.parameters)}" if self.parameters else "it takes none"
            raise UsageError(f"{self.name} has no parameter {printable(unknown[0])}: {takes}")

    def _erased(self, labels: Sequence[str | None], chosen: Mapping[str, str]) -> frozenset[str | None]:
        """The labels of what was erased; capitals don't tell two apart."""
        if self.groups.erased is None:
            return frozenset()
        known: dict[str, str] = {}
        for label in labels:
            if label is not None:
                known.setdefault(label.casefold(), label)
        there = f"one of {', '.join(map(printable, known.values()))}"[:400]
        if self.groups.erased != "chosen":
            asked: tuple[str, ...] = self.groups.erased
        elif not chosen.get("erased", "").strip():
            raise UsageError(f"{self.name} needs to know what was erased: give --set erased=LABEL, {there}")
        else:
            # A label may hold commas itself.
            whole = chosen["erased"].strip()
            asked = (whole,) if whole.casefold() in known else tuple(part.strip() for part in whole.split(","))
        for label in asked:
            if label.casefold() not in known:
                raise UsageError(f"{self.name} has no prompts labelled {short(label)}: give {there}")
        wanted = {label.casefold() for label in asked}
        return frozenset(label for label in labels if label is not None and label.casefold() in wanted)

    def _group(self, label: str | None, erased: frozenset[str | None]) -> Literal["erased", "kept"]:
        if self.groups.all is not None:
            return self.groups.all
        return "erased" if label in erased else "kept"

    def _case(self, prompts: TablePrompts, row: PromptRow, group: str, path: Path) -> Case:
        try:
            return Case(
                id=row.id,
                prompt=row.prompt,
                seed=prompts.first_seed + row.number if row.seed is None else row.seed,
                guidance_scale=self.sampling.guidance_scale if row.guidance_scale is None else row.guidance_scale,
                group=group,
                label=row.label,
                negative_prompt=row.negative_prompt or "",
                height=row.height,
                width=row.width,
            )
        except UsageError as error:
            raise UsageError(f"{printable(path)}:{row.line}: {error}") from error

    def _prompt_path(self, prompts: TablePrompts, given: Path | None) -> Path:
        if given is not None:
            return given / prompts.file if given.is_dir() else given
        if isinstance(prompts, HubPrompts):
            return hub_file(self.name, prompts)
        if self._folder is not None:
            return self._folder / prompts.file
        where = f"; {told}" if (told := getattr(prompts, "where", "")) else ""
        raise UsageError(f"{self.name} needs its prompts, which aren't shipped: give --prompts {prompts.file}{where}")


def bundled() -> list[ProtocolFile]:
    """Every protocol that comes with excise, by name."""
    return [load_protocol(name) for name in _names()]


def load_protocol(name_or_path: str | Path) -> ProtocolFile:
    """A bundled protocol by its name, or a user's by the path of its file.

    Raises:
        UsageError: neither; a file that can't be read; YAML that isn't a protocol, with the line and the field.
    """
    if str(name_or_path) in _names():
        path = _PROTOCOLS / f"{name_or_path}.yaml"
        return validated(ProtocolFile, parse_yaml(path.read_bytes(), f"protocol {name_or_path}"))
    path, shown = Path(name_or_path), printable(name_or_path)
    what = f"name a protocol file, or one of {', '.join(_names())}"
    close = difflib.get_close_matches(str(name_or_path), _names(), n=1)
    hint = f"did you mean {close[0]}?" if close else what
    missing = f"no protocol is named {shown}, and no such file exists: {hint}"
    content = read_named(path, LIMIT, folder=what, missing=missing)
    protocol = validated(ProtocolFile, parse_yaml(content, shown))
    protocol._folder = path.parent
    return protocol


def _names() -> list[str]:
    return sorted(path.stem for path in _PROTOCOLS.glob("*.yaml"))
