"""The models of the embedded server's protocols: ``MODEL`` with its default edit, and ``MODEL@EDIT`` for each edit."""

from __future__ import annotations

from excise.serve.engine import Served, ServedEdit
from excise.serve.http_errors import RequestRefused, quoted

SEPARATOR = "@"


class Models:
    """Names to edits. Names are compared as they are: nothing of a request becomes a path."""

    def __init__(self, served: Served) -> None:
        self.served, self.default = served, served.edits[0]
        self._edits = {edit.name: edit for edit in served.edits}
        self._models = {served.model: self.default}
        self._models |= {f"{served.model}{SEPARATOR}{edit.name}": edit for edit in served.edits}

    @property
    def names(self) -> tuple[str, ...]:
        """Every model's name, the one with the default edit first."""
        return tuple(self._models)

    def model(self, name: str) -> ServedEdit:
        """The edit of a model. Raises ``RequestRefused`` (404) for one that isn't served."""
        if name not in self._models:
            raise RequestRefused(
                f"model {quoted(name)!r} isn't served here: choose one of {_listed(self.names)}",
                status=404,
                code="model_not_found",
                param="model",
            )
        return self._models[name]

    def choose(self, model: str | None, edit: str | None, param: str = "edit") -> ServedEdit:
        """The edit that a request means by its model, its edit, or both. An empty edit is none.

        Raises:
            RequestRefused: One of them isn't served, or they are different edits.
        """
        chosen = self.default if model is None else self.model(model)
        if not edit:
            return chosen
        if edit not in self._edits:
            raise RequestRefused(
                f"edit {quoted(edit)!r} isn't served here: choose one of {_listed(tuple(self._edits))}",
                code="unknown_edit",
                param=param,
            )
        if model is not None and SEPARATOR in model and self._edits[edit] != chosen:
            raise RequestRefused(f"model {model} and edit {edit} are different edits: name one of them", param=param)
        return self._edits[edit]


def _listed(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:10])
    return shown if len(names) <= 10 else f"{shown}, … ({len(names)} in all)"
