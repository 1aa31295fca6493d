"""JSON over HTTP with an endpoint that the user named: retries, and one clear line for whatever goes wrong.

Nothing is sent to any other place: redirections aren't followed, and a key is sent only where its environment variable
was named. ``HTTP_PROXY``, ``NO_PROXY`` and ``SSL_CERT_FILE`` are httpx's to obey.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from excise.errors import ArtefactError, MissingExtra, UsageError

if TYPE_CHECKING:
    import httpx

#: Answers that another try may turn into a result.
RETRIED = frozenset({408, 429, 500, 502, 503, 504})

#: Seconds before the first further try, doubled for each one after, and the longest of them.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, and how patiently.

    Raises:
        UsageError: no http or https URL, one with a password or options in it, or a key's variable that isn't set.
        MissingExtra: httpx isn't installed.
    """

    url: str
    timeout: float = 300.0  #: seconds without a byte of the answer
    retries: int = 4  #: tries after the first
    key_env: str | None = None  #: the environment variable that holds a bearer token
    sleep: Callable[[float], object] = field(default=time.sleep, repr=False)

    def __post_init__(self) -> None:
        check_url(self.url)
        if self.key_env is not None and not os.environ.get(self.key_env):
            raise UsageError(f"key_env={self.key_env}: there is no such environment variable, or it is empty")
        _httpx()

    def session(self) -> Session:
        """Connections to share between the requests of one batch, and its threads: a context manager."""
        return Session(self)


class Session:
    """Open connections to an endpoint. Safe to share between threads."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        key = os.environ[endpoint.key_env] if endpoint.key_env is not None else None
        self._client = _httpx().Client(
            timeout=endpoint.timeout, headers={} if key is None else {"Authorization": f"Bearer {key}"}
        )

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def post(self, path: str, document: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that a ``POST`` of a JSON object is answered with.

        Raises:
            UsageError: nothing listens there, it wants another address or key, or refuses the request.
            ArtefactError: it fails, doesn't answer in time, or answers with something else than a JSON object.
        """
        response = self._sent("POST", path, document)
        if not response.is_success:
            raise self._refused(response)
        return _json_object(response)

    def get(self, path: str) -> dict[str, Any] | None:
        """The JSON object at a path; None where the endpoint has nothing there.

        Raises:
            UsageError, ArtefactError: as ``post``.
        """
        response = self._sent("GET", path, None)
        if response.status_code in (400, 404, 405, 501):
            return None
        if not response.is_success:
            raise self._refused(response)
        return _json_object(response)

    def _sent(self, method: str, path: str, document: dict[str, Any] | None) -> httpx.Response:
        """The first answer that isn't worth another try."""
        library, endpoint = _httpx(), self._endpoint
        url = endpoint.url.rstrip("/") + path
        pause = FIRST_PAUSE
        for left in range(endpoint.retries, -1, -1):
            wanted = pause
            failure: UsageError | ArtefactError
            try:
                response: httpx.Response = self._client.request(method, url, json=document)
            except library.TimeoutException:
                failure = ArtefactError(
                    f"{url} did not answer within {endpoint.timeout:g} s ({_tries(endpoint)}): is it still loading? "
                    "More time is timeout=SECONDS"
                )
            except library.ConnectError as error:
                failure = UsageError(
                    f"{url} can't be reached ({_one_line(str(error))}; {_tries(endpoint)}): start the server, or "
                    "correct the address"
                )
            except library.TransportError as error:
                failure = ArtefactError(f"{url} broke off ({_one_line(str(error))}; {_tries(endpoint)})")
            else:
                if response.status_code not in RETRIED:
                    return response
                failure = ArtefactError(f"{url} answered {_status(response)} ({_tries(endpoint)})")
                wanted = max(pause, _retry_after(response))
            if left:
                endpoint.sleep(min(wanted, LONGEST_PAUSE))
                pause *= 2
        raise failure

    def _refused(self, response: httpx.Response) -> UsageError:
        """Why an answer that no other try would change is none."""
        url, status = str(response.request.url), _status(response)
        if response.is_redirect:
            return UsageError(f"{url} is redirected to {response.headers.get('location')}: name that address")
        if response.status_code in (401, 403):
            return UsageError(f"{url} answered {status}: name the variable that holds its key, key_env=VARIABLE")
        return UsageError(f"{url} answered {status}")


def check_url(url: str) -> None:
    """Raise ``UsageError`` unless ``url`` is an http or https address without a password, query or fragment."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        sound = False
    if not sound:
        raise UsageError(f"{url!r} isn't an address: write http://HOST:PORT or https://HOST")
    if parts.username is not None or parts.password is not None:
        raise UsageError(
            f"the address of {parts.hostname} holds a password, which reports would show: keep the key in an "
            "environment variable and name that, key_env=VARIABLE"
        )
    if parts.query or parts.fragment:
        raise UsageError(f"{url!r} has a query or fragment: name the server's address alone")


def _httpx() -> Any:
    try:
        import httpx
    except ModuleNotFoundError as error:
        raise MissingExtra("httpx", "eval") from error
    return httpx


def _tries(endpoint: Endpoint) -> str:
    return "one try" if not endpoint.retries else f"{endpoint.retries + 1} tries"


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the endpoint asks to wait; 0 where it doesn't say, or gives a date."""
    given = response.headers.get("retry-after", "")
    return float(given) if given.isascii() and given.isdigit() else 0.0


def _one_line(text: str, longest: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def _status(response: httpx.Response) -> str:
    """Status and, where the endpoint gives one, its reason."""
    try:
        document = response.json()
    except ValueError:
        document = None
    reason: Any = document.get("error", document.get("detail", "")) if isinstance(document, dict) else ""
    if isinstance(reason, dict):
        reason = reason.get("message", "")
    status = f"{response.status_code} {response.reason_phrase}".strip()
    return f"{status}: {_one_line(str(reason))}" if reason else status


def _json_object(response: httpx.Response) -> dict[str, Any]:
    url = str(response.request.url)
    try:
        document = response.json()
    except (ValueError, RecursionError) as error:
        kind = response.headers.get("content-type", "no content type").partition(";")[0]
        title = re.search(r"<title[^>]*>(.*?)</title>", response.text[:4096], re.IGNORECASE | re.DOTALL)
        shown = f" ({_one_line(title[1], 80)})" if title else ""
        raise ArtefactError(
            f"{url} answered {kind}{shown} instead of JSON: is that the address of the API itself?"
        ) from error
    if not isinstance(document, dict):
        raise ArtefactError(f"{url} answered a JSON {type(document).__name__}, not an object")
    return document
