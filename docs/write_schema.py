"""Write docs/report-schema.md from the models of ``excise.eval.evaluation``; a test compares the two."""

from __future__ import annotations

import inspect
import io
import json
import tokenize
import types
import typing
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from excise.eval import evaluation, evaluation_comparison

PAGE = Path(__file__).parent / "report-schema.md"
#: Outermost first.
MODELS: tuple[type[BaseModel], ...] = (
    evaluation.Evaluation,
    evaluation.ProtocolRecord,
    evaluation.RuntimeRecord,
    evaluation.Provenance,
    evaluation.Measure,
    evaluation.Comparison,
    evaluation.CaseRecord,
    evaluation.Finding,
    evaluation.PaperFigure,
    evaluation.SweepRecord,
    evaluation_comparison.EvaluationComparison,
    evaluation_comparison.ComparedMeasure,
)
_INTRODUCTION = f"""# report.json

Written by `make docs` from the models in `eval/evaluation.py` and `eval/evaluation_comparison.py`.

`excise eval` writes `report.json`, one `Evaluation`, beside the images that it speaks of; `excise eval --compare`
writes an `EvaluationComparison`. The format is {evaluation.FORMAT}: a reader refuses any other, and any field that is
not listed here. Keys are sorted and there are no times of day, so that equal evaluations are equal files. Numbers are
finite; `null` stands where there is none. `Evaluation.model_json_schema()` in `excise.eval.evaluation` says the same
as a JSON Schema.
"""


def page() -> str:
    """The whole reference as Markdown."""
    return "\n".join([_INTRODUCTION, *(_section(model) for model in MODELS)])


def _section(model: type[BaseModel]) -> str:
    notes = meanings(model)
    rows = [
        f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {_cell(notes.get(name, ''))} |"
        for name, field in model.model_fields.items()
    ]
    table = "\n".join(["| field | type | default | meaning |", "|---|---|---|---|", *rows])
    return f"## {model.__name__}\n\n{_cell(inspect.getdoc(model) or '')}\n\n{table}\n"


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """Each field's ``#:`` comment, behind it or above it."""
    found: dict[str, str] = {}
    above: list[str] = []
    name = None
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(model)).readline):
        if token.type == tokenize.COMMENT and token.string.startswith("#:"):
            text = token.string.removeprefix("#:").strip()
            if token.line.lstrip().startswith("#:"):
                above.append(text)
            elif name is not None:
                found[name] = text
        elif token.type == tokenize.NAME and token.line.lstrip().startswith(f"{token.string}:"):
            name = token.string
            if above:
                found[name] = " ".join(above)
                above = []
    return found


def _type(annotation: object) -> str:
    """A field's type as JSON has it."""
    plain = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null", typing.Any: "any"}
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in plain:
        return plain[annotation]
    if origin is typing.Literal:
        return " or ".join(f"`{value!r}`".replace("'", '"') for value in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type(one) for one in arguments)
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"object of {_type(arguments[1])}"
    assert isinstance(annotation, type)
    return f"[{annotation.__name__}](#{annotation.__name__.lower()})"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, BaseModel):
        return "empty"
    return f"`{json.dumps(value)}`"


def _prose(text: str) -> str:
    return " ".join(text.replace("``", "`").split())


def _cell(text: str) -> str:
    return _prose(text).replace("|", "\\|").replace("None", "`null`")


if __name__ == "__main__":
    PAGE.write_text(page())
