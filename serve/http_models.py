"""The models of the embedded server's protocols: ``MODEL`` with its default edit, and ``MODEL@EDIT`` for each edit.

With a policy, each tenant has models of its own: those of the edits that it may choose, its default first. A model or
an edit that it may not choose looks to it like one that doesn't exist.
"""

from __future__ import annotations

from dataclasses import replace

from starlette.requests import Request as HttpRequest

from excise.serve.edit_policy import EditPolicy
from excise.serve.engine import Served, ServedEdit
from excise.serve.http_errors import RequestRefused, quoted

SEPARATOR = "@"


class Models:
    """Names to edits. Names are compared as they are: nothing of a request becomes a path.

    Args:
        served: What may be chosen.
        restricted: There may be more than that: an edit that isn't in ``served`` is forbidden, not unknown.
    """

    def __init__(self, served: Served, *, restricted: bool = False) -> None:
        self.served, self._restricted = served, restricted
        self._edits = {edit.name: edit for edit in served.edits}
        self._models = {served.model: served.edits[0]} if served.edits else {}
        self._models |= {f"{served.model}{SEPARATOR}{edit.name}": edit for edit in served.edits}

    @property
    def names(self) -> tuple[str, ...]:
        """Every model's name, the one with the default edit first."""
        return tuple(self._models)

    def model(self, name: str) -> ServedEdit:
        """The edit of a model. Raises ``RequestRefused``: 404 for one that isn't served, 403 for a forbidden one."""
        if name in self._models:
            return self._models[name]
        own = self.served.model
        if self._restricted and (name == own or name.startswith(f"{own}{SEPARATOR}")):
            raise self._forbidden(f"model {quoted(name)!r}", "model", self.names)
        choice = f": choose one of {_listed(self.names)}" if self._models else ""
        raise RequestRefused(
            f"model {quoted(name)!r} isn't served here{choice}", status=404, code="model_not_found", param="model"
        )

    def choose(self, model: str | None, edit: str | None, param: str = "edit") -> ServedEdit:
        """The edit that a request means by its model, its edit, or both. An empty edit is none.

        Raises:
            RequestRefused: One of them isn't served, may not be chosen, or they are different edits.
        """
        chosen = self.model(self.served.model if model is None else model)
        if not edit:
            return chosen
        if edit not in self._edits:
            if self._restricted:
                raise self._forbidden(f"edit {quoted(edit)!r}", param, tuple(self._edits))
            raise RequestRefused(
                f"edit {quoted(edit)!r} isn't served here: choose one of {_listed(tuple(self._edits))}",
                code="unknown_edit",
                param=param,
            )
        if model is not None and SEPARATOR in model and self._edits[edit] != chosen:
            raise RequestRefused(f"model {model} and edit {edit} are different edits: name one of them", param=param)
        return self._edits[edit]

    def _forbidden(self, what: str, param: str, open_to: tuple[str, ...]) -> RequestRefused:
        if open_to:
            message = f"{what} isn't one that this client may choose: choose one of {_listed(open_to)}"
        else:
            message = "this client may choose no edit here: ask the operator for access"
        return RequestRefused(message, status=403, code="edit_not_allowed", param=param)


class TenantModels:
    """The models of each tenant.

    Args:
        served: All that there is.
        policy: Which tenant may choose what of it; None: each may choose all.

    Raises:
        UsageError: The policy names an edit that isn't served.
    """

    def __init__(self, served: Served, policy: EditPolicy | None) -> None:
        self.served = served
        if policy is not None:
            policy.check((edit.name for edit in served.edits), "the policy")
        self._others = _models_of(served, policy, None)
        self._own = {} if policy is None else {tenant: _models_of(served, policy, tenant) for tenant in policy.tenants}
        #: What every client may know and choose; None where that depends on the client.
        self.everybodys: Models | None = self._others if policy is None else None

    def of(self, http: HttpRequest) -> Models:
        """Those of the tenant that a request's key belongs to; the policy's default for all others."""
        tenant: str | None = http.scope.get("state", {}).get("tenant")
        return self._others if tenant is None else self._own.get(tenant, self._others)


def _models_of(served: Served, policy: EditPolicy | None, tenant: str | None) -> Models:
    if policy is None:
        return Models(served)
    edits = {edit.name: edit for edit in served.edits}
    allowed = tuple(edits[name] for name in dict.fromkeys(policy.allowed(tenant)))
    concepts = {edit.name: served.concepts.get(edit.name, ()) for edit in allowed}
    return Models(replace(served, edits=allowed, concepts=concepts), restricted=True)


def _listed(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:10])
    return shown if len(names) <= 10 else f"{shown}, … ({len(names)} in all)"
