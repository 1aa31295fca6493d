"""The edit file's document: fields that came later are in it only where they say something."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from excise.editmetadata import Detection, EditMetadata, Erased, Kept, StageFigures, StopRule

GROWN = {"detection", "stop_rule", "training"}


def metadata(**changes: Any) -> EditMetadata:
    given: dict[str, Any] = {
        "excise_version": "0.1.0",
        "method": "rece",
        "recipe": {"ridge": 0.1},
        "concepts": (Erased(erase="gun", to="sunflower"),),
        "kept": Kept.of(["cat"]),
        "token_rule": "all",
        "family": "stable-diffusion",
        "streams": (),
        "weights_fingerprint": "0",
        "text_encoder_fingerprint": "1",
        "stages": (StageFigures(stage="uce", stream="text", moved=0.5),),
    }
    return EditMetadata(**{**given, **changes})


def test_a_document_from_before_they_were_there_stays_as_it_is() -> None:
    """An edit's id is its digest, and manifests name edits by it. Other fields are written whatever they say."""
    document = json.loads(metadata().model_dump_json())
    assert set(document) == set(EditMetadata.model_fields) - GROWN
    assert set(document["stages"][0]) == set(StageFigures.model_fields) - {"detected_after"}
    assert document["stages"][0]["detected"] is None
    again = EditMetadata.model_validate_json(metadata().model_dump_json())
    assert again == metadata()
    assert again.model_dump_json() == metadata().model_dump_json()


def test_they_are_written_where_they_say_something_and_read_again() -> None:
    detection = Detection(
        detector="fake",
        fingerprint="0" * 64,
        labels=("gun",),
        others=("cat",),
        concepts=("gun",),
        pictures=2,
        seeds=(0, 1),
        scheduler="DDIM",
        num_inference_steps=5,
        guidance_scale=7.5,
    )
    stage = StageFigures(stage="epoch 1", stream="text", moved=0.5, detected=1.0, detected_after=0.0)
    rule = StopRule(judge="detector", gain=0.005, most=10)
    inner = metadata(detection=detection, stages=(stage,), stop_rule=rule)
    outer = metadata(parts=(("id", inner),))
    again = EditMetadata.model_validate_json(outer.model_dump_json())
    assert again == outer
    assert again.detection is None
    assert again.parts[0][1].stages[0].detected_after == 0
    assert again.parts[0][1].detection == detection
    assert outer.model_dump(mode="json") == json.loads(outer.model_dump_json())


def test_unknown_fields_are_refused() -> None:
    document = {**metadata().model_dump(mode="json"), "detector": "mine"}
    with pytest.raises(ValidationError, match="detector"):
        EditMetadata.model_validate(document)
