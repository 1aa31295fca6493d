"""Tenants of the embedded server: what each key may see and choose on every route, and that nothing else decides."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from excise.errors import UsageError
from excise.serve import http_auth
from excise.serve.edit_policy import EditPolicy
from excise.serve.http_app import create_app
from excise.serve.http_models import TenantModels
from excise.serve.http_settings import ServerSettings, key_digest
from tests.serve.fake_engine import STYLE, WEAPONS, FakeEngine
from tests.serve.http_serving import client_of

IMAGES = "/v1/images/generations"
STUDIO, BLOCKED, PLAIN, UNLISTED = (f"{name}-key-0123456789" for name in ("studio", "blocked", "plain", "unlisted"))
POLICY = EditPolicy.model_validate({"default": ["weapons"], "tenants": {"studio": ["style", "weapons"], "blocked": []}})
CLOSED = EditPolicy.model_validate({"tenants": {"studio": ["style", "weapons"], "blocked": []}})


def settings_of(policy: EditPolicy | None, **more: Any) -> ServerSettings:
    digests = {key: key_digest(key) for key in (STUDIO, BLOCKED, PLAIN, UNLISTED)}
    return ServerSettings(
        api_key_digests=tuple(digests.values()),
        api_key_tenants={digests[STUDIO]: "studio", digests[BLOCKED]: "blocked", digests[UNLISTED]: "in no policy"},
        policy=policy,
        **more,
    )


Ask = Callable[..., Awaitable[Any]]


def with_server(settings: ServerSettings, watched: Callable[[Ask, FakeEngine], Awaitable[None]]) -> None:
    """Run ``watched`` with what sends a request with a key, and the engine."""

    async def run() -> None:
        engine = FakeEngine()
        async with client_of(create_app(engine, settings)) as client:

            async def ask(key: str | None, method: str, path: str, *, headers: Any = None, **more: Any) -> Any:
                own = {} if key is None else {"authorization": f"Bearer {key}"}
                return await client.request(method, path, headers={**own, **(headers or {})}, **more)

            await watched(ask, engine)

    asyncio.run(run())


def taken(engine: FakeEngine) -> list[str | None]:
    """The edits of the images that clients asked for: the warm-up's prompt is empty."""
    return [job.request.request.edit for job in engine.jobs if job.request.request.prompt]


def infer_body(*edits: str) -> dict[str, Any]:
    columns = {"PROMPT": ["a cat"] * max(1, len(edits)), **({"EDIT": list(edits)} if edits else {})}
    return {"inputs": [{"name": k, "datatype": "BYTES", "shape": [len(v), 1], "data": v} for k, v in columns.items()]}


@pytest.mark.parametrize(
    ("key", "names"),
    [
        (STUDIO, ["tiny", "tiny@style", "tiny@weapons"]),
        (PLAIN, ["tiny", "tiny@weapons"]),
        (UNLISTED, ["tiny", "tiny@weapons"]),
        (BLOCKED, []),
    ],
)
def test_a_tenant_sees_its_own_models(key: str, names: list[str]) -> None:
    async def watched(ask: Ask, engine: FakeEngine) -> None:
        listed = (await ask(key, "GET", "/v1/models")).json()["data"]
        assert [one["id"] for one in listed] == names
        index = (await ask(key, "POST", "/v2/repository/index")).json()
        assert [one["name"] for one in index] == names
        for name in names:
            assert (await ask(key, "GET", f"/v1/models/{name}")).status_code == 200
            for suffix in ("", "/config", "/versions/1", "/versions/1/config"):
                assert (await ask(key, "GET", f"/v2/models/{name}{suffix}")).status_code == 200
        if names:
            allowed = [name.partition("@")[2] for name in names[1:]]
            assert [one["name"] for one in listed[0]["edits"]] == allowed
            assert listed[0]["edit"]["name"] == allowed[0], "the tenant's default, not the server's"
            config = (await ask(key, "GET", "/v2/models/tiny/config")).json()["parameters"]
            assert config["excise.edit"] == {"string_value": allowed[0]}
        for path in ("/v1/models", "/v2/repository/index", "/openapi.json"):
            text = (await ask(key, "POST" if "index" in path else "GET", path)).text
            hidden = {"style": STYLE, "base": "tiny@base"} if key != STUDIO else {"base": "tiny@base"}
            assert "tiny@base" not in text
            assert not any(one in text for one in hidden.values())
            if key != STUDIO:
                assert "tiny@style" not in text

    with_server(settings_of(POLICY), watched)


@pytest.mark.parametrize("other", ["style", "none-such"])
def test_an_edit_that_the_tenant_may_not_choose_is_refused_on_every_route(other: str) -> None:
    """Whether it exists can't be told: but for its name, which the client sent, the answer is the same."""

    async def watched(ask: Ask, engine: FakeEngine) -> None:
        asked: list[tuple[str, str, Any]] = [
            ("POST", IMAGES, {"prompt": "a", "edit": other}),
            ("POST", IMAGES, {"prompt": "a", "edit": other, "stream": True}),
            ("POST", IMAGES, {"prompt": "a", "model": f"tiny@{other}"}),
            ("POST", IMAGES, {"prompt": "a", "model": f"tiny@{other}", "edit": "weapons"}),
            ("POST", IMAGES, {"prompt": "a", "model": "tiny", "edit": other}),
            ("GET", f"/v1/models/tiny@{other}", None),
            ("POST", "/v2/models/tiny/infer", infer_body(other)),
            ("POST", "/v2/models/tiny/infer", infer_body("weapons", other)),
            ("POST", "/v2/models/tiny/versions/1/infer", infer_body(other)),
            ("POST", f"/v2/models/tiny@{other}/infer", infer_body()),
            ("GET", f"/v2/models/tiny@{other}", None),
            ("GET", f"/v2/models/tiny@{other}/ready", None),
            ("GET", f"/v2/models/tiny@{other}/config", None),
        ]
        for method, path, body in asked:
            answer = await ask(PLAIN, method, path, **({} if body is None else {"json": body}))
            assert answer.status_code == 403, (path, body, answer.text)
            error = answer.json()["error"]
            if path.startswith("/v2"):
                message = error
                assert set(answer.json()) == {"error"}
            else:
                message = error["message"]
                assert (error["code"], error["type"]) == ("edit_not_allowed", "invalid_request_error")
            assert "isn't one that this client may choose: choose one of" in message
            assert "weapons" in message
            assert STYLE not in answer.text
        assert taken(engine) == []

    with_server(settings_of(POLICY), watched)


@pytest.mark.parametrize(("policy", "key"), [(POLICY, BLOCKED), (CLOSED, BLOCKED), (CLOSED, PLAIN), (CLOSED, UNLISTED)])
def test_who_may_choose_nothing_is_refused(policy: EditPolicy, key: str) -> None:
    async def watched(ask: Ask, engine: FakeEngine) -> None:
        for path, body in (
            (IMAGES, {"prompt": "a"}),
            (IMAGES, {"prompt": "a", "edit": "weapons"}),
            ("/v2/models/tiny/infer", infer_body()),
            ("/v2/models/tiny@weapons/infer", infer_body()),
        ):
            answer = await ask(key, "POST", path, json=body)
            assert answer.status_code == 403
            assert "this client may choose no edit here" in answer.text
        assert (await ask(key, "POST", IMAGES, json={"prompt": "a", "model": "other"})).status_code == 404
        assert taken(engine) == []

    with_server(settings_of(policy), watched)


def test_each_tenant_gets_its_own_default_and_its_choices() -> None:
    async def watched(ask: Ask, engine: FakeEngine) -> None:
        cases = [(STUDIO, {}, STYLE), (STUDIO, {"edit": "weapons"}, WEAPONS), (STUDIO, {"model": "tiny@style"}, STYLE)]
        cases += [(PLAIN, {}, WEAPONS), (UNLISTED, {"model": "tiny"}, WEAPONS), (PLAIN, {"edit": ""}, WEAPONS)]
        for key, body, edit in cases:
            answer = await ask(key, "POST", IMAGES, json={"prompt": "a", **body})
            assert (answer.status_code, answer.json()["edit_id"]) == (200, edit)
            assert taken(engine)[-1] == edit
        for key, edits, edit in ((STUDIO, [], STYLE), (PLAIN, [], WEAPONS), (STUDIO, ["weapons"], WEAPONS)):
            answer = await ask(key, "POST", "/v2/models/tiny/infer", json=infer_body(*edits))
            assert answer.status_code == 200
            assert taken(engine)[-1] == edit

    with_server(settings_of(POLICY), watched)


def test_only_the_key_says_who_the_tenant_is() -> None:
    async def watched(ask: Ask, engine: FakeEngine) -> None:
        claimed = {"tenant": "studio", "x-tenant": "studio", "triton-tenant": "studio"}
        body = {**infer_body("style"), "parameters": {"tenant": "studio"}}
        answer = await ask(PLAIN, "POST", "/v2/models/tiny/infer?tenant=studio", json=body, headers=claimed)
        assert answer.status_code == 403
        for more in ({}, {"user": "studio"}):
            body = {"prompt": "a", "edit": "style", **more}
            answer = await ask(PLAIN, "POST", f"{IMAGES}?tenant=studio", json=body, headers=claimed)
            assert answer.status_code == 403
        listed = (await ask(PLAIN, "GET", "/v1/models?tenant=studio", headers=claimed)).json()["data"]
        assert [one["id"] for one in listed] == ["tiny", "tiny@weapons"]

    with_server(settings_of(POLICY), watched)


def test_without_keys_everybody_is_a_client_of_no_tenant() -> None:
    async def watched(ask: Ask, engine: FakeEngine) -> None:
        assert (await ask(None, "POST", IMAGES, json={"prompt": "a", "edit": "weapons"})).status_code == 200
        assert (await ask(STUDIO, "POST", IMAGES, json={"prompt": "a", "edit": "style"})).status_code == 403

    with_server(ServerSettings(policy=POLICY), watched)


def test_without_a_policy_a_tenant_may_choose_all() -> None:
    """The negative control: it is the policy that refuses."""

    async def watched(ask: Ask, engine: FakeEngine) -> None:
        for edit in ("weapons", "style", "base"):
            assert (await ask(BLOCKED, "POST", IMAGES, json={"prompt": "a", "edit": edit})).status_code == 200
        assert (await ask(BLOCKED, "POST", IMAGES, json={"prompt": "a", "edit": "none-such"})).status_code == 400
        assert "tiny@base" in (await ask(BLOCKED, "GET", "/openapi.json")).text

    with_server(settings_of(None), watched)


def test_wrong_keys_are_answered_as_without_tenants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_auth, "WAITING", 3)
    compared: list[str] = []

    def compare(first: str, second: str) -> bool:
        compared.append(second)
        return first == second

    async def watched(ask: Ask, engine: FakeEngine) -> None:
        monkeypatch.setattr("hmac.compare_digest", compare)
        guesses = await asyncio.gather(*(ask("wrong" * 5, "GET", "/v1/models") for _ in range(6)))
        assert sorted(one.status_code for one in guesses) == [401] * 3 + [429] * 3
        assert len(compared) == 6 * 4, "every key is compared, those of tenants too"
        assert not any("studio" in one.text for one in guesses)

    with_server(settings_of(POLICY), watched)


def test_the_tenant_is_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    audit = tmp_path / "audit.jsonl"

    async def watched(ask: Ask, engine: FakeEngine) -> None:
        for key in (STUDIO, PLAIN):
            await ask(key, "POST", IMAGES, json={"prompt": "a"})

    caplog.set_level(logging.INFO, "excise")
    with_server(settings_of(POLICY, audit_log=audit), watched)
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    assert [(line.get("tenant"), line["edit"]) for line in lines] == [("studio", "style"), (None, "weapons")]
    logged = [json.loads(record.message) for record in caplog.records if record.name == "excise.access"]
    assert [line.get("tenant") for line in logged] == ["studio", None]


def test_policies_that_do_not_fit() -> None:
    strange = EditPolicy.model_validate({"default": ["cats"]})
    with pytest.raises(UsageError, match=r"names edit 'cats', which isn't here: these are weapons, style, base"):
        TenantModels(FakeEngine().served, strange)
    with pytest.raises(UsageError, match="names edit 'cats'"):
        create_app(FakeEngine(), ServerSettings(policy=strange))
    for keys in ({}, {"api_key_digests": (key_digest(PLAIN),)}):
        with pytest.raises(ValueError, match="no client may choose any edit"):
            ServerSettings(policy=CLOSED, **keys)
    with pytest.raises(ValueError, match="isn't the beginning of a digest in api_key_digests"):
        ServerSettings(api_key_tenants={key_digest(PLAIN): "studio"})
