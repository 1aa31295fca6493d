"""Protocols: what is asked for, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from excise.demo.vocabulary import KEPT, OBJECTS, WEAPONS
from excise.errors import UsageError
from excise.eval.protocol import PromptSeeds, Protocol, demo_weapons


def test_demo_covers_the_vocabulary() -> None:
    protocol = demo_weapons(images_per_erased=3, images_per_kept=2)
    assert [row.label for row in protocol.erased] == list(WEAPONS)
    assert [row.label for row in protocol.kept] == list(KEPT)
    assert list(protocol.labels) == list(OBJECTS)
    assert protocol.erased_labels == set(WEAPONS)
    assert (protocol.erased_count, protocol.kept_count) == (3 * len(WEAPONS), 2 * len(KEPT))
    prompts = {row.prompt for row in (*protocol.erased, *protocol.kept)}
    assert {"a gun", "an axe", "an apple", "a cat"} <= prompts


def test_requests_follow_the_rows(protocol: Protocol) -> None:
    rows, requests = protocol.rows(), protocol.requests()
    assert [(row.prompt, row.seeds[0]) for row in rows] == [(request.prompt, request.seed) for request in requests]
    assert all(row.label in protocol.erased_labels for row in rows[: protocol.erased_count])
    assert not any(row.label in protocol.erased_labels for row in rows[protocol.erased_count :])


def test_an_image_has_its_own_noise_per_seed(protocol: Protocol) -> None:
    assert len({(request.prompt, request.seed, request.index) for request in protocol.requests()}) == 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"erased": ()}, "at least one each"),
        ({"kept": ()}, "at least one each"),
        ({"num_inference_steps": 0}, "at least 1, not 0"),
        ({"erased_labels": frozenset({"gun", "knife", "whale"})}, "doesn't have: whale"),
        ({"erased": (PromptSeeds("a gun", "gun", ()),)}, "distinct seeds"),
        ({"erased": (PromptSeeds("a gun", "gun", (1, 1)),)}, "distinct seeds"),
        ({"erased": (PromptSeeds("a whale", "whale", (0,)),)}, "the detector doesn't have"),
        ({"erased": (PromptSeeds("a pig", "pig", (0,)),)}, "its label 'pig' is not"),
        ({"kept": (PromptSeeds("a rifle", "gun", (0,)),)}, "its label 'gun' is erased"),
        ({"kept": (PromptSeeds("a gun", "cat", (0,)),)}, "repeated"),
    ],
)
def test_what_can_not_be_judged_is_refused(protocol: Protocol, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(protocol, **change)
