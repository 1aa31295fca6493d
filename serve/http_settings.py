"""What the operator of an embedded server decides: limits, defaults, keys, the output filter and what is recorded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from excise.errors import UsageError
from excise.serve.edit_policy import EditPolicy

#: A key with fewer characters could be guessed.
SHORTEST_KEY = 16

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def key_digest(key: str) -> str:
    """The SHA-256 of an API key, in hexadecimal digits: what ``ServerSettings.api_key_digests`` holds.

    Raises:
        UsageError: The key is too short, or can't be sent in a header.
    """
    if len(key) < SHORTEST_KEY:
        raise UsageError(
            f"an API key has {len(key)} characters: give at least {SHORTEST_KEY}, such as `openssl rand -hex 32` writes"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(
            "an API key holds a space or a character that no header carries: give ASCII letters and digits"
        )
    return hashlib.sha256(key.encode()).hexdigest()


class ServerSettings(BaseModel):
    """Settings of ``excise.serve.http_app.create_app``. Times are in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    api_key_digests: tuple[Sha256, ...] = ()
    """Of the keys that clients may send, each from ``key_digest``; without any, nobody is asked for one."""
    api_key_tenants: dict[Sha256, Annotated[str, Field(min_length=1)]] = {}
    """The tenant that a key belongs to, by the key's digest; a key that isn't here belongs to none."""
    policy: EditPolicy | None = None
    """Which tenant may choose which edit; without one, every client may choose each."""
    open_metrics: bool = True
    """Whether ``/metrics`` is answered without a key; the health routes always are."""

    max_body_bytes: Count = 1 << 20
    body_timeout: Positive = 30.0
    """For a whole body to arrive."""
    header_timeout: Positive = 10.0
    """For a request's headers to arrive."""
    keep_alive: Count = 5
    """How long a connection may idle between two requests."""
    max_connections: Count = 1024
    """Further ones are closed at once."""

    max_prompt_characters: Count = 4000
    max_n: Count = 8
    """Images of one request."""
    max_steps: Count = 100
    max_guidance_scale: Positive = 50.0
    default_steps: Count = 25
    default_guidance_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 7.5
    deadline: Positive | None = None
    """Within which an image has to be ready. A request may ask for less, never for more."""

    output_filter: Literal["none", "blur", "refuse"] = "none"
    """What happens to an image that shows nudity."""
    filter_score: Annotated[float, Field(gt=0, le=1)] = 0.25
    """From which a detection counts; 0.25 is the least score that the detector gives."""

    audit_log: Path | None = None
    log_prompts: bool = False
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call this server from a browser; none by default."""
    warm_up_steps: Count = 2
    """Of the image that is made before the server says that it is ready."""
    drain_retry_after: Count = 10
    """What ``Retry-After`` says while the server shuts down."""

    @model_validator(mode="after")
    def _tenants_of_keys(self) -> ServerSettings:
        if strange := [digest for digest in self.api_key_tenants if digest not in self.api_key_digests]:
            raise ValueError(f"api_key_tenants: {strange[0][:12]} isn't the beginning of a digest in api_key_digests")
        if self.policy is not None:
            tenants = {self.api_key_tenants.get(digest) for digest in self.api_key_digests} or {None}
            if not any(self.policy.allowed(tenant) for tenant in tenants):
                raise ValueError(
                    "policy: no client may choose any edit: give it a default, or give a tenant that it lists a key"
                )
        return self

    @model_validator(mode="after")
    def _defaults_within_limits(self) -> ServerSettings:
        for name, value, limit in (
            ("default_steps", self.default_steps, self.max_steps),
            ("default_guidance_scale", self.default_guidance_scale, self.max_guidance_scale),
        ):
            if value > limit:
                raise ValueError(f"{name}={value} is over its own limit of {limit}")
        return self
