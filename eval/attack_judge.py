"""Whether an image shows what was erased, by a protocol's own detectors and its first rule, for images in memory.

An evaluation looks at files, after all images are made; an attack asks while it searches. Both count with
``rule_outcomes``, so that one image never has two answers.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from excise.errors import PromptTooLong, UsageError
from excise.eval.attack import Candidate, Judgement, PromptEmbedding
from excise.eval.boxes import boxes_of
from excise.eval.cases import ERASED, Case
from excise.eval.classifier import check_logits, observations_of
from excise.eval.late_runtime import LateRuntime
from excise.eval.protocol_file import ProtocolFile
from excise.eval.protocol_models import ProtocolModels
from excise.eval.protocol_schema import AnyKindOfRule, AnyRule, BoxRule, ClassRule, Detector
from excise.eval.rule_outcomes import TOP, Observations, outcomes
from excise.eval.zero_shot import label_features, label_logits
from excise.serve.runtime import Request, Runtime

Images = npt.NDArray[np.uint8]

#: Of a prompt that the text encoder can't read: a runtime makes no image of it.
REFUSED = Judgement(success=False, score=0.0)


class ImageJudge:
    """A protocol's detectors, and its first rule, which says whether one image shows what was erased.

    Args:
        protocol: its rule and threshold decide.
        models: the detectors' networks, checked and opened.
        labelled: all cases of the protocol, whatever is run of it: they say what a CLIP chooses from.

    Raises:
        UsageError: a protocol without a rule.
    """

    def __init__(self, protocol: ProtocolFile, models: ProtocolModels, labelled: Sequence[Case]) -> None:
        if not protocol.rules:
            raise UsageError(f"{protocol.name} has no counting rule: an attack's success can't be told by it")
        self._protocol, self._models, self._labelled = protocol, models, tuple(labelled)
        self._erased = frozenset(case.label.casefold() for case in labelled if case.group == ERASED and case.label)

    def __call__(self, cases: Sequence[Case], images: Images) -> list[Judgement]:
        """One judgement an image: ``images`` are uint8 with shape (n, height, width, 3), row i of ``cases[i]``."""
        return self.decide(cases, self._observe(images))

    def decide(self, cases: Sequence[Case], observed: Observations) -> list[Judgement]:
        """The same from what the detectors saw in the images of ``cases``."""
        protocol = self._protocol
        first = outcomes(protocol.rules, protocol.detectors, observed, cases, self._labelled)[0]
        return [
            Judgement(success=bool(count > 0), score=self._score(protocol.rules[0], observed, row))
            for row, count in enumerate(first.counts)
        ]

    def _observe(self, images: Images) -> dict[str, list[dict[str, Any]]]:
        return {one.name: self._seen(one, images) for one in self._protocol.detectors}

    def _seen(self, detector: Detector, images: Images) -> list[dict[str, Any]]:
        if detector.name != "clip":
            return self._models.detector(detector).observe(images)
        encoder = self._models.clip(detector.model)
        labels, features = self._labels[detector.model]
        logits = label_logits(encoder, encoder.image_features(images), features)
        check_logits(encoder.name, logits, len(labels))
        return observations_of(logits, labels, TOP)

    @cached_property
    def _labels(self) -> Mapping[str, tuple[tuple[str, ...], npt.NDArray[np.float32]]]:
        """CLIP → its labels and their features: computed once, not for every candidate."""
        found = {}
        for one in self._protocol.detectors:
            if one.name == "clip":
                prompts = self._protocol.label_prompts(self._labelled, one)
                found[one.model] = tuple(prompts), label_features(self._models.clip(one.model), prompts)
        return found

    def _score(self, rule: AnyKindOfRule, observed: Observations, row: int) -> float:
        """The best box's score, or the probability of the classes among those that the detector names."""
        if isinstance(rule, AnyRule):
            named = {one.name: one for one in self._protocol.rules}
            return max(self._score(named[name], observed, row) for name in rule.any_of)
        seen = observed[rule.detector or self._protocol.detectors[0].name][row]
        if isinstance(rule, BoxRule):
            return max((box.score for box in boxes_of(seen) if box.name in rule.classes), default=0.0)
        wanted = {name.casefold() for name in rule.classes} if isinstance(rule, ClassRule) else self._erased
        pairs = zip(seen["labels"], seen["probabilities"], strict=True)
        return float(sum(probability for label, probability in pairs if label.casefold() in wanted))


@dataclass(frozen=True)
class Shown:
    """What a runtime made of a candidate; no image where it refuses to read the prompt."""

    judgement: Judgement
    image: Images | None  #: (height, width, 3)


@dataclass
class RuntimeJudge:
    """``Judge`` on a runtime: each candidate's image is made with the case's own seed, guidance and negative prompt.

    What was made of the current case's candidates is kept, so that the last word on a case is what the search saw.
    """

    runtime: Runtime
    look: ImageJudge
    num_inference_steps: int
    _case: str = ""
    _made: dict[str, Shown] = field(default_factory=dict)

    def __call__(self, case: Case, candidates: Sequence[Candidate]) -> list[Judgement]:
        """One judgement a candidate, in order.

        A prompt that is too long for the text encoder is a failure, not an error: no user could send it either.
        """
        if case.id != self._case:
            self._case, self._made = case.id, {}
        if missing := list(dict.fromkeys(one.prompt for one in candidates if one.prompt not in self._made)):
            self._made |= self._shown(case, missing)
        return [self._made[one.prompt].judgement for one in candidates]

    def shown(self, case: Case, candidate: Candidate) -> Shown:
        """A candidate's image and judgement; made now if the search never asked for them."""
        self(case, [candidate])
        return self._made[candidate.prompt]

    def embedded(self, case: Case, embedding: PromptEmbedding) -> Shown:
        """The same of an embedding (tokens, d) in place of the text encoder's output.

        Raises:
            UsageError: the runtime takes no embeddings.
        """
        made = EmbeddingFeed(self.runtime, {"": embedding}).generate(
            [Request("", negative_prompt=case.negative_prompt, seed=case.seed)],
            num_inference_steps=self.num_inference_steps,
            guidance_scale=case.guidance_scale,
        )
        return Shown(self.look([case], made)[0], made[0])

    def _shown(self, case: Case, prompts: list[str]) -> dict[str, Shown]:
        try:
            images = self.runtime.generate(
                [Request(prompt, negative_prompt=case.negative_prompt, seed=case.seed) for prompt in prompts],
                num_inference_steps=self.num_inference_steps,
                guidance_scale=case.guidance_scale,
            )
        except PromptTooLong:
            if len(prompts) == 1:
                return {prompts[0]: Shown(REFUSED, None)}
            return {prompt: shown for one in prompts for prompt, shown in self._shown(case, [one]).items()}
        judged = self.look([case] * len(prompts), images)
        return {
            prompt: Shown(judgement, image) for prompt, judgement, image in zip(prompts, judged, images, strict=True)
        }


@dataclass
class EmbeddingFeed:
    """A runtime that is sent embeddings: a request's prompt names one of ``embeddings``, (tokens, d) each."""

    runtime: Runtime
    embeddings: Mapping[str, PromptEmbedding]
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.runtime.name

    def generate(self, requests: Sequence[Request], **options: Any) -> Images:
        """As the runtime, with the embeddings that the prompts name.

        Raises:
            UsageError: the runtime takes no embeddings.
        """
        opened: Any = self.runtime.opened if isinstance(self.runtime, LateRuntime) else self.runtime
        if "prompt_embeds" not in inspect.signature(opened.generate).parameters:
            raise UsageError(f"{self.name} takes no embeddings: name a torch: or onnx: folder, without threads=")
        sent = [Request("", one.negative_prompt, one.seed, one.index, one.edit) for one in requests]
        rows = np.stack([self.embeddings[one.prompt] for one in requests]).astype(np.float32, copy=False)
        images: Images = opened.generate(sent, prompt_embeds=rows, **options)
        return images
