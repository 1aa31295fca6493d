"""What an attack is made of: the unedited and the attacked model, opened when they are asked for, and target images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from excise.errors import UsageError
from excise.eval.attack import Attack, EmbeddingAttack
from excise.eval.cases import Case
from excise.eval.image_file import read_image
from excise.eval.late_runtime import LateRuntime
from excise.eval.protocol_models import ProtocolModels
from excise.eval.runtime_spec import RuntimeSpec

if TYPE_CHECKING:
    from excise.eval.torch_runtime import TorchRuntime


@dataclass
class Session:
    """What ``AttackPlan.make`` builds attacks from.

    Attributes:
        base: of the unedited model.
        attacked: of the model that is attacked, the one that judges.
        num_inference_steps: of every image.
        models: the protocol's networks, opened.
        targets: the unedited model's image of each case, by its id.
    """

    base: LateRuntime
    attacked: LateRuntime
    num_inference_steps: int
    models: ProtocolModels
    targets: Mapping[str, Path] = field(default_factory=dict)

    def target(self, case: Case) -> npt.NDArray[np.uint8]:
        """The unedited model's image of a case, uint8 with shape (height, width, 3)."""
        image: npt.NDArray[np.uint8] = read_image(self.targets[case.id])
        return image

    @property
    def torch(self) -> TorchRuntime:
        """The attacked model in PyTorch.

        Raises:
            UsageError: another kind of runtime, which has no gradients.
        """
        return with_gradients(self.attacked)

    @property
    def torch_base(self) -> TorchRuntime:
        """The unedited model in PyTorch. Raises as ``torch``."""
        return with_gradients(self.base)


def with_gradients(late: LateRuntime) -> TorchRuntime:
    """A runtime of a diffusers pipeline, opened.

    Raises:
        UsageError: another kind of runtime.
    """
    check_gradients(late.spec)
    return cast("TorchRuntime", late.opened)


def check_gradients(spec: RuntimeSpec) -> None:
    """Raise ``UsageError`` for a runtime that isn't a PyTorch model: there is nothing to search with."""
    if spec.kind != "torch" or "threads" in spec.options:
        raise UsageError(
            f"{spec} has no gradients to attack with: attack the PyTorch model that it was exported from, and replay "
            f"what is found, excise attack replay FOUND --runtime {spec.name}={spec}"
        )


@dataclass(frozen=True)
class AttackPlan:
    """Which attacks, and how to make them once the models are open.

    Attributes:
        names: of the attacks, in order.
        settings: all that what they find depends on besides models and cases: JSON.
        make: builds them; not called where no case is left to attack.
    """

    names: tuple[str, ...]
    settings: Mapping[str, Any]
    make: Callable[[Session], Sequence[Attack | EmbeddingAttack]]
