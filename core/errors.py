"""Every error that excise raises on purpose.

    ExciseError                     anything below; the command line prints it on one line and exits with 2
    ├── UsageError                  an argument that can't be used (empty concept, unknown preset, …)
    │   └── PromptTooLong           more tokens than the text encoder reads
    ├── ModelError                  a model folder that is missing, half-written or not what is needed
    │   └── NoCrossAttention        a model without anything to edit
    ├── EditError                   an edit file that can't be read
    │   └── FingerprintMismatch     an edit that was made for another model
    ├── ArtefactError               an exported folder that is incomplete, altered or of an unknown format
    ├── NumericsError               a closed form that has no finite answer for these inputs
    ├── OutputError                 a place that can't be written, or holds something already
    ├── MissingExtra                a library of an optional extra isn't installed
    └── NotServed                   a request that a server didn't carry out, and not for what it asks
        ├── QueueFull               as many requests are waiting as may
        ├── DeadlineExceeded        the image wasn't ready in time
        └── Draining                the server is shutting down

A message names the value that is wrong and says what to do about it, on one line.
"""

from __future__ import annotations


class ExciseError(Exception):
    """Anything that a user can put right."""


class UsageError(ExciseError):
    """An argument that can't be used."""


class PromptTooLong(UsageError):
    """A prompt with more tokens than the text encoder reads."""


class ModelError(ExciseError):
    """A model folder that is missing, half-written or of the wrong kind."""


class NoCrossAttention(ModelError):
    """A model without cross-attention: there is nothing to edit."""


class EditError(ExciseError):
    """An edit file that can't be read."""


class FingerprintMismatch(EditError):
    """An edit that was made for another model."""


class ArtefactError(ExciseError):
    """An exported folder that is incomplete, altered or of an unknown format."""


class NumericsError(ExciseError):
    """A closed form that has no finite answer for these inputs."""


class OutputError(ExciseError):
    """A place that can't be written, or that holds something already."""


class MissingExtra(ExciseError):
    """A library of an optional extra isn't installed."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} isn't installed: pip install 'excise[{extra}]'")
        self.library, self.extra = library, extra


class NotServed(ExciseError):
    """A request that a server didn't carry out, and not for what it asks."""


class QueueFull(NotServed):
    """As many requests are waiting as may: ask again after ``retry_after`` seconds."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} requests are waiting already: try again in {retry_after:.0f} s")
        self.waiting, self.retry_after = waiting, retry_after


class DeadlineExceeded(NotServed):
    """The image wasn't ready in time."""


class Draining(NotServed):
    """The server is shutting down and takes no more requests."""
