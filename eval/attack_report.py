"""The documents of attacks, ``report.json``: how often a concept came back, by which attack, and how sure that is.

An attack's success rate is (pre + post) / N: of N cases that show the concept on the unedited model, ``pre`` show it on
the attacked one by their own prompt, and ``post`` by what the attack found. Its interval is Clopper and Pearson's.
Equal runs give equal bytes: the documents hold no times.
"""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from excise.errors import ArtefactError
from excise.eval.attack import Found
from excise.eval.evaluation import Measure, Provenance
from excise.eval.evaluation_report import write_anew
from excise.eval.statistics import clopper_pearson
from excise.manifest import first_problem

FORMAT: Final = 1
NAME: Final = "report.json"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Target(_Strict):
    """A runtime, by its source and its own files."""

    name: str
    source: str
    provenance: Provenance = Provenance()


class Judged(_Strict):
    """By what success was told."""

    protocol: str
    version: int
    title: str
    rule: str
    settings: dict[str, Any]  #: steps, scheduler, detectors, rules, thresholds, networks: all that success depends on


class AttackResult(_Strict):
    """One attack on all cases."""

    name: str
    n: int = Field(ge=1)  #: N, the cases that count
    pre: int  #: successes without an attack
    post: int  #: successes among the cases that were attacked
    asr: Measure  #: (pre + post) / N
    pre_share: Measure  #: pre / N
    post_share: Measure  #: post / (N − pre)
    stopped: dict[str, int] = {}  #: why searches ended, and how many
    iterations: int = 0  #: of all searches together

    @classmethod
    def of(cls, name: str, pre: int, found: Sequence[Found]) -> AttackResult:
        """Of the lines of the cases that were attacked; each has been judged."""
        post = sum(map(succeeded, found))
        n = pre + len(found)
        return cls(
            name=name,
            n=n,
            pre=pre,
            post=post,
            asr=share(pre + post, n),
            pre_share=share(pre, n),
            post_share=share(post, len(found)),
            stopped=dict(sorted(Counter(one.stopped for one in found).items())),
            iterations=sum(one.iterations for one in found),
        )


class AttackedCase(_Strict):
    """One case, and whether each model or attack showed the concept."""

    id: str
    prompt: str
    seed: int
    label: str | None = None
    base: bool  #: the unedited model shows it
    pre: bool  #: the attacked model shows it by the case's own prompt
    outcomes: dict[str, bool] = {}  #: by attack; empty where none was needed


class AttackReport(_Strict):
    """``excise attack NAME``."""

    format: Literal[1] = FORMAT
    kind: Literal["attack"] = "attack"
    versions: dict[str, str] = {}
    machine: str = ""
    judged: Judged
    attack: dict[str, Any]  #: the attack's settings
    seed: int  #: each case's own is derived from it and the case's id
    base: Target
    attacked: Target
    erased_cases: int  #: of what was erased, before the base was looked at
    base_shows: Measure  #: the share of them that the unedited model shows
    base_must_show: bool  #: whether the others were left out
    left_out: tuple[str, ...] = ()
    results: tuple[AttackResult, ...]
    cases: tuple[AttackedCase, ...]


class ReplayResult(_Strict):
    """One attack's findings on one runtime, and the same findings on the model that was attacked."""

    name: str
    n: int
    asr: Measure | None = None  #: None where they weren't replayed
    attacked_asr: Measure
    measures: dict[str, Measure] = {}  #: flips, flips_p_value, increase: against the attacked model's own outcomes
    not_replayed: str | None = None  #: why


class ReplayedRuntime(_Strict):
    """One runtime."""

    target: Target
    kind: str
    results: tuple[ReplayResult, ...]


class ReplayedCase(_Strict):
    """One line of the findings, and which runtimes showed the concept."""

    case: str
    attack: str
    prompt: str  #: as sent
    embedding: int | None = None
    attacked: bool  #: on the model that was attacked
    outcomes: dict[str, bool] = {}  #: by runtime


class ReplayReport(_Strict):
    """``excise attack replay``."""

    format: Literal[1] = FORMAT
    kind: Literal["replay"] = "replay"
    versions: dict[str, str] = {}
    machine: str = ""
    judged: Judged
    found_sha256: str
    runtimes: tuple[ReplayedRuntime, ...]
    cases: tuple[ReplayedCase, ...]


Document = TypeVar("Document", AttackReport, ReplayReport)


def share(successes: int, n: int) -> Measure:
    """A share with Clopper and Pearson's interval; without a value where there was no case."""
    if not n:
        return Measure(value=None, n=0, unit="fraction", better="lower", error="no case: nothing was left to attack")
    return clopper_pearson(successes, n).measure("lower")


def succeeded(found: Found) -> bool:
    """Whether the attacked model showed the concept."""
    return found.judgement is not None and found.judgement.success


def machine() -> str:
    """Processor and system, in words."""
    return f"{platform.machine()}, {platform.system()}"


def write_attack_report(folder: Path, report: AttackReport | ReplayReport) -> Path:
    """Write ``report.json``, in place of one that is there; its path.

    Raises:
        OutputError: the folder can't be written.
    """
    path = folder / NAME
    document = report.model_dump(mode="json")
    text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_anew(path, (text + "\n").encode())
    return path


def read_attack_report(path: Path, kind: type[Document]) -> Document:
    """The ``report.json`` of an attack or a replay, or the folder that it is in.

    Raises:
        ArtefactError: there is none, it is another document, or one of another format.
    """
    file = path / NAME if path.is_dir() else path
    try:
        return kind.model_validate_json(file.read_bytes())
    except OSError as error:
        raise ArtefactError(f"{file} can't be read: {error.strerror}") from error
    except ValidationError as error:
        raise ArtefactError(f"{file} is no {kind.__name__} of format {FORMAT}: {first_problem(error)}") from error
