"""The published RECE implementation's own results, stage by stage (tests/golden/README.md)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from excise.edit.rece import Rece, rece
from excise.edit.tokens import Concept
from excise.edit.uce import Scales, uce

FOLDER = Path(__file__).parent.parent / "golden"

#: Measured: 1.7e-12 (nudity), 6.2e-12 (artists), 7e-13 (tensor). The rest is room for other BLAS libraries.
TOLERANCE = 1e-10


@dataclass(frozen=True)
class Golden:
    meta: dict[str, Any]
    arrays: dict[str, Tensor]
    sites: tuple[str, ...]
    concepts: tuple[Concept, ...]

    def weights(self, stage: str) -> list[Tensor]:
        return [self.arrays[f"{stage}/{site}"] for site in self.sites]

    def kept(self) -> list[Tensor]:
        return [self.arrays[f"retain/{index}"] for index in range(len(self.meta["retain"]))]

    def scales(self, stage: str) -> Scales:
        scales = self.meta[stage]
        return Scales(scales["erase"], keep=scales["preserve"], ridge=scales["lam"])

    def run(self) -> Rece:
        return rece(
            self.weights("before"),
            self.concepts,
            iter(self.kept()),
            uce_scales=self.scales("uce"),
            epoch_scales=self.scales("step"),
            epochs=self.meta["epochs"],
            ridge=self.meta["rece_lambda"],
            technique=self.meta["technique"],
        )


@pytest.fixture(params=["rece_nudity_d32", "rece_artists_d48", "rece_tensor_d32"])
def golden(request: pytest.FixtureRequest) -> Golden:
    with np.load(FOLDER / f"{request.param}.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "meta"}
        meta = json.loads(str(file["meta"]))
    concepts = tuple(
        Concept(
            tokens=arrays[f"concept/{index}"],
            target=arrays[f"target/{index}"],
            tokens_length=int(arrays[f"concept_len/{index}"]),
            target_length=int(arrays[f"target_len/{index}"]),
        )
        for index in range(len(meta["concepts"]))
    )
    sites = tuple(name.removeprefix("before/") for name in arrays if name.startswith("before/"))
    return Golden(meta, arrays, sites, concepts)


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def test_uce_stage(golden: Golden) -> None:
    transform = uce(
        golden.weights("before"),
        golden.concepts,
        golden.kept(),
        scales=golden.scales("uce"),
        technique=golden.meta["technique"],
    )
    for site, (before, after) in enumerate(zip(golden.weights("before"), golden.weights("uce"), strict=True)):
        assert error(transform.on_weight(before, site), after) < TOLERANCE
        assert error(before, after) > 0.1, "the unedited weights pass: the comparison shows nothing"


def test_every_epoch(golden: Golden) -> None:
    result = golden.run()
    assert len(result.epochs) == golden.meta["epochs"]
    assert result.transform is result.epochs[-1].transform
    before = golden.weights("before")
    previous = golden.weights("uce")
    for number, epoch in enumerate(result.epochs, start=1):
        for index, derived in enumerate(epoch.derived):
            assert error(derived, golden.arrays[f"adv{number}/{index}"]) < TOLERANCE
            assert error(golden.concepts[index].tokens, golden.arrays[f"adv{number}/{index}"]) > 0.1
        after = golden.weights(f"rece{number}")
        for site, weight in enumerate(after):
            assert error(epoch.transform.on_weight(before[site], site), weight) < TOLERANCE
            assert error(previous[site], weight) > 0.01, "the stage before passes: the comparison shows nothing"
        previous = after


def test_the_other_technique_fails(golden: Golden) -> None:
    other: Any = "tensor" if golden.meta["technique"] == "replace" else "replace"
    transform = uce(
        golden.weights("before"), golden.concepts, golden.kept(), scales=golden.scales("uce"), technique=other
    )
    edited = transform.on_weight(golden.weights("before")[0], 0)
    assert error(edited, golden.weights("uce")[0]) > 0.01
