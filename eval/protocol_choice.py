"""One protocol with what the user chose of it: prompts, parameters, fewer cases, other steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from excise.errors import UsageError
from excise.eval.cases import Case
from excise.eval.protocol_file import ProtocolFile
from excise.eval.protocol_models import ProtocolModels
from excise.eval.protocol_sample import limit, sample
from excise.eval.protocol_schema import Sweep, TablePrompts
from excise.eval.rule_outcomes import check_rules
from excise.eval.runtime_spec import RuntimeSpec
from excise.eval.verification_sides import SCHEDULER
from excise.serve.schedulers import read_scheduler_config


@dataclass(frozen=True)
class Choice:
    """One protocol with what the user chose of it."""

    protocol: ProtocolFile
    prompts: Path | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    sample: int | None = None
    sample_seed: int = 0
    num_inference_steps: int | None = None
    #: Take each model's own scheduler, whatever the protocol names.
    own_scheduler: bool = False
    #: Make every image in its model's own size, whatever the prompts ask for.
    own_size: bool = False
    #: The ablation that this run is: among its runtimes are those that the sweep names.
    sweep: Sweep | None = None

    def all_cases(self) -> tuple[Case, ...]:
        """Every case of the protocol.

        Raises:
            UsageError: the prompts can't be read, or a parameter is missing or unknown.
        """
        return self.protocol.cases(self.prompts, self.parameters)

    def cases(self, everything: Sequence[Case]) -> tuple[Case, ...]:
        """Those that are run: a sample, and the first of it."""
        chosen = tuple(everything)
        if self.sample is not None:
            chosen = sample(chosen, self.sample, self.sample_seed)
        chosen = chosen if self.limit is None else limit(chosen, self.limit)
        return tuple(replace(case, height=None, width=None) for case in chosen) if self.own_size else chosen

    @property
    def steps(self) -> int:
        """Denoising steps."""
        return self.num_inference_steps or self.protocol.sampling.num_inference_steps

    def settings(self) -> dict[str, Any]:
        """All that the figures depend on, as run."""
        document = self.protocol.settings(self.parameters)
        document["sampling"]["num_inference_steps"] = self.steps
        if self.sweep is not None:
            document["sweep"] = self.sweep.model_dump(mode="json")
        if self.own_scheduler:
            document["sampling"]["scheduler"] = "each model's own"
        if self.own_size and isinstance(prompts := self.protocol.prompts, TablePrompts) and prompts.columns.width:
            document["sampling"]["size"] = "each model's own"
        chosen = {"limit": self.limit, "sample": self.sample}
        document["chosen"] = {name: value for name, value in chosen.items() if value is not None}
        if self.sample is not None:
            document["chosen"]["sample_seed"] = self.sample_seed
        return document

    def check_scheduler(self, spec: RuntimeSpec) -> None:
        """Whether a folder's scheduler is the protocol's; a server's can't be seen.

        Raises:
            UsageError: it is another.
        """
        wanted, name = self.protocol.sampling.scheduler, self.protocol.name
        if wanted is None or self.own_scheduler or spec.kind not in ("torch", "onnx"):
            return
        own = read_scheduler_config(Path(spec.place) / SCHEDULER)["_class_name"]
        if own != wanted:
            raise UsageError(
                f"{name} samples with {wanted}, and {spec.place} with {own}: put the protocol's scheduler into its "
                "folder, or give --scheduler own, which the report will name"
            )

    def check_rules(self, models: ProtocolModels, labelled: Sequence[Case]) -> None:
        """Whether every rule can count. Opens the detectors.

        Args:
            labelled: all cases of the protocol.

        Raises:
            UsageError: a class or label that a detector doesn't know.
        """
        labels: dict[str, Sequence[str]] = {}
        for one in self.protocol.detectors:
            clip = one.name == "clip"
            labels[one.name] = (
                tuple(self.protocol.label_prompts(labelled, one)) if clip else models.detector(one).labels
            )
            if clip and len(labels["clip"]) < 2:
                raise UsageError(
                    f"{self.protocol.name}: clip chooses between the prompts' labels, of which there are "
                    f"{len(labels['clip'])}: name their column"
                )
        try:
            check_rules(self.protocol.rules, self.protocol.detectors, labels, labelled)
        except UsageError as error:
            raise UsageError(f"{self.protocol.name}, {error}") from error
