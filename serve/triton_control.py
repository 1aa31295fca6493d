"""A running Triton, as far as a promotion needs it: load a model, see which versions are ready, and try one.

Source: KServe's protocol, version 2, with Triton's model repository extension.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any
from urllib.parse import quote, urlsplit

from excise.errors import ArtefactError, MissingExtra, UsageError
from excise.printable import printable

_PAUSE = 0.25
#: Of the statuses of an answer, those by which a version itself fails. What a request asks for is 4xx.
_FAILED = (500, 503)
#: What Triton says, also with 503, where the version hasn't seen the request.
_BUSY = ("Exceeds maximum queue size", "Request timeout expired")


class TritonServer:
    """Triton's HTTP interface at ``url``, a context manager.

    ``timeout`` is in seconds, for one model to load. Raises ``UsageError`` for an address that isn't http or https, or
    where nothing is alive, and ``MissingExtra`` without httpx.
    """

    def __init__(self, url: str, *, timeout: float = 600.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"url={printable(url)}: give Triton's HTTP address, such as http://127.0.0.1:8000")
        try:
            import httpx
        except ModuleNotFoundError as error:
            raise MissingExtra("httpx", "serve") from error
        self.url, self.timeout = url.rstrip("/"), timeout
        self._httpx = httpx
        self._client = httpx.Client(timeout=timeout)
        try:
            self._sent("GET", "/v2/health/live")
        except ArtefactError as error:
            self._client.close()
            raise UsageError(f"{error}: is that a Triton server's HTTP address?") from error

    def __enter__(self) -> TritonServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def load(self, model: str, version: int) -> str | None:
        """Have a model loaded as its configuration now says, and wait until a version is ready.

        Returns:
            Why the server refused, on one line; None once the version is ready.

        Raises:
            ArtefactError: It didn't answer in time or went away, so that nobody knows.
        """
        response = self._sent("POST", f"/v2/repository/models/{quote(model, safe='')}/load", {})
        if not response.is_success:
            return _reason(response)
        return self._awaited(model, version)

    def infer(self, model: str, version: int, document: object) -> str | None:
        """Send a version a request, again while its queue is full.

        Returns:
            Why the version failed, on one line; None if it answered, or found fault with the request.

        Raises:
            ArtefactError: It didn't answer in time or went away, so that nobody knows.
        """
        deadline = time.monotonic() + self.timeout
        while True:
            response = self._sent("POST", f"/v2/models/{quote(model, safe='')}/versions/{version}/infer", document)
            if response.status_code not in _FAILED:
                return None
            reason = _reason(response)
            if not any(busy in reason for busy in _BUSY):
                return reason
            if time.monotonic() > deadline:
                raise ArtefactError(f"{self.url} had no place for one request in {self.timeout:.0f} s ({reason})")
            time.sleep(_PAUSE)

    def versions(self, model: str) -> dict[str, str]:
        """State of each version of a model that the server knows, with the reason where it isn't ready.

        Raises:
            ArtefactError: The server doesn't say.
        """
        response = self._sent("POST", "/v2/repository/index", {})
        found = _json(response)
        if not response.is_success or not isinstance(found, list):
            raise ArtefactError(f"{self.url} doesn't list its models: {_reason(response)}")
        return {
            str(one.get("version") or "-"): printable(" ".join([str(one.get("state", "")), str(one.get("reason", ""))]))
            for one in found
            if isinstance(one, dict) and one.get("name") == model
        }

    def _awaited(self, model: str, version: int) -> str | None:
        deadline = time.monotonic() + self.timeout
        place = f"/v2/models/{quote(model, safe='')}/versions/{version}/ready"
        while not self._sent("GET", place).is_success:
            state = self.versions(model).get(str(version), "")
            if state.startswith("UNAVAILABLE ") and state.split(maxsplit=1)[1:] not in ([], ["unloaded"]):
                return state.removeprefix("UNAVAILABLE ")
            if time.monotonic() > deadline:
                raise ArtefactError(f"{self.url} has no version {version} of {model} ready after {self.timeout:.0f} s")
            time.sleep(_PAUSE)
        return None

    def _sent(self, method: str, path: str, document: object = None) -> Any:
        try:
            return self._client.request(method, f"{self.url}{path}", json=document)
        except self._httpx.HTTPError as error:
            what = printable(error) or type(error).__name__
            raise ArtefactError(f"{self.url} didn't answer {method} {path} ({what})") from error


def _json(response: Any) -> Any:
    try:
        return response.json()
    except ValueError:
        return None


def _reason(response: Any) -> str:
    """What a refusal says, on one line."""
    found = _json(response)
    text = found.get("error") if isinstance(found, dict) else None
    return printable(" ".join(str(text or f"HTTP status {response.status_code}").split()))
