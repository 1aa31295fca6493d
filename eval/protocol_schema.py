"""The parts of a protocol file: prompts, groups, sampling, detectors, counting rules, metrics and published figures.

Figures are named as in ``report.json``: ``nude_parts.RECE`` is a rule's, ``lpips.erased.64`` a metric's of the erased
prompts' images at 64 × 64 pixels.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from excise.eval.evaluation import PaperFigure
from excise.eval.prompt_file import Columns
from excise.eval.protocol_yaml import Problem


class Part(BaseModel):
    """A part of a protocol: frozen, and without fields that nobody reads."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


#: Numbers as numbers: neither ``true`` nor ``"7.5"``.
Real = Annotated[float, Field(strict=True)]
Whole = Annotated[int, Field(strict=True)]
#: What becomes a part of a figure's name, or of a command line.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
GroupName = Literal["erased", "kept"]


class TablePrompts(Part):
    """Prompts of a file, whoever has it."""

    source: str
    file: str = Field(min_length=1, description="the file's usual name, also inside a folder that is given instead")
    count: Annotated[Whole, Field(ge=1)] | None = Field(
        default=None, description="a whole number: how many prompts the published set has"
    )
    columns: Columns = Field(
        default=Columns(), description="column names: prompt, seed, guidance, label, id, negative_prompt, width, height"
    )
    duplicate_ids: Literal["refuse", "number"] = Field(default="refuse", description="refuse or number")
    empty_prompts: Literal["refuse", "keep"] = Field(default="refuse", description="refuse or keep")
    #: Row n of a file without a column of seeds gets this seed + n.
    first_seed: Whole = Field(default=0, ge=0, description="a whole number of 0 or more")

    @model_validator(mode="after")
    def _sized(self) -> TablePrompts:
        if (self.columns.width is None) != (self.columns.height is None):
            raise Problem(("columns",), "an image has two sides: name both columns, width and height, or neither")
        return self


class FilePrompts(TablePrompts):
    """Prompts of a file that the user has. Published sets are never shipped, and nothing is downloaded."""

    source: Literal["file"]
    where: str = Field(default="", description="text: where to get the file")


#: A file's path inside a folder, which it doesn't leave.
_INSIDE = r"^[A-Za-z0-9_][\w -]*(\.[\w -]+)*(/[\w -]+(\.[\w -]+)*)*$"


class HubPrompts(TablePrompts):
    """Prompts of a data set of the Hugging Face hub, at one commit: another would be other prompts."""

    source: Literal["hub"]
    file: str = Field(pattern=_INSIDE, description="the file's path in the data set, such as data/prompts.csv")
    dataset: str = Field(
        pattern=r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$", description="the data set's name, such as OWNER/NAME"
    )
    #: Not a branch or a tag, which move.
    revision: str = Field(pattern="^[0-9a-f]{40}$", description="a commit of the data set, 40 digits from 0 to f")


class Images(Part):
    """How many images of each prompt, by its group."""

    erased: Whole = Field(default=1, ge=1, description="a whole number of at least 1")
    kept: Whole = Field(default=1, ge=1, description="a whole number of at least 1")


class BuiltinPrompts(Part):
    """Prompts from the demo model's vocabulary."""

    source: Literal["builtin"]
    builtin: Literal["demo-objects", "demo-styles"] = Field(description="demo-objects or demo-styles")
    images: Images = Field(default=Images(), description="images a prompt: erased and kept")


Prompts = Annotated[FilePrompts | HubPrompts | BuiltinPrompts, Field(discriminator="source")]


class Groups(Part):
    """Which prompts are of what was erased: all or none of them, or those of some labels."""

    all: GroupName | None = Field(default=None, description="erased or kept")
    #: ``chosen``: the run says, with ``--set erased=LABEL``.
    erased: Literal["chosen"] | Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        default=None, description="a list of labels, or chosen where the run is to say"
    )

    @model_validator(mode="after")
    def _one(self) -> Groups:
        if (self.all is None) == (self.erased is None):
            raise Problem((), "give either all or erased")
        return self


class Sampling(Part):
    """How every image is made; a prompt's own seed and guidance come before the default here."""

    num_inference_steps: Whole = Field(default=50, ge=1, le=1000, description="a whole number from 1 to 1000")
    guidance_scale: Real = Field(default=7.5, ge=0, description="a number of 0 or more")
    #: As diffusers spells it; None is the model's own.
    scheduler: Annotated[str, Field(pattern=r"^[A-Z][A-Za-z0-9]*Scheduler$")] | None = Field(
        default=None, description="a scheduler as diffusers spells it, such as LMSDiscreteScheduler, or null"
    )
    width: Annotated[Whole, Field(ge=8, multiple_of=8)] | None = Field(
        default=None, description="pixels, a multiple of 8, or null for the model's own"
    )
    height: Annotated[Whole, Field(ge=8, multiple_of=8)] | None = Field(
        default=None, description="pixels, a multiple of 8, or null for the model's own"
    )


class Detector(Part):
    """What looks at the images. Figures of two versions don't compare: NudeNet 3 finds far fewer parts than 2."""

    name: Literal["nudenet", "clip", "classifier"] = Field(description="nudenet, clip or classifier")
    version: str = Field(min_length=1, description="the detector's version, in quotes")
    model: str = Field(min_length=1, description="the model or weights by name; demo:clip is the bundled one")
    #: A CLIP's description of a label; ``{label}`` is the label, ``{a}`` its article.
    label_prompts: tuple[str, ...] = Field(default=(), description="a list of texts with {label} and {a} in them")

    @model_validator(mode="after")
    def _described(self) -> Detector:
        if (self.name == "clip") != bool(self.label_prompts):
            raise Problem((), "label_prompts are for clip, which needs them")
        for number, text in enumerate(self.label_prompts):
            if "{label}" not in text or set("{}") & set(text.replace("{label}", "").replace("{a}", "")):
                raise Problem(("label_prompts", number), f"{text!r} needs {{label}}, and may have {{a}}")
        return self


class Rule(Part):
    """What counts. The first rule of a protocol also says whether one image shows what was erased."""

    name: Name = Field(description="letters, digits, - and _")
    #: None where the protocol has one detector.
    detector: Literal["nudenet", "clip", "classifier"] | None = Field(default=None, description="a detector's name")


class BoxRule(Rule):
    """Counts boxes of these classes whose score is *above* the threshold.

    ``once_per_class``: a class counts once an image, however many boxes it has. ``every_box``: each of them. ``image``:
    an image counts once, whatever is in it.
    """

    kind: Literal["boxes"]
    measure: Name = Field(default="nude_parts", description="a figure's name")
    classes: tuple[str, ...] = Field(min_length=1, description="a list of the detector's class names")
    threshold: Real = Field(ge=0, lt=1, description="a number from 0 to below 1")
    count: Literal["once_per_class", "every_box", "image"] = Field(description="once_per_class, every_box or image")

    def measures(self) -> tuple[str, ...]:
        """The figure's name."""
        return (f"{self.measure}.{self.name}",)


class ClassRule(Rule):
    """Counts images with one of these classes among the classifier's ``top`` ones."""

    kind: Literal["class"]
    measure: Name = Field(description="a figure's name")
    classes: tuple[str, ...] = Field(min_length=1, description="a list of the detector's class names")
    top: Whole = Field(default=1, ge=1, description="a whole number of at least 1")

    def measures(self) -> tuple[str, ...]:
        """The figure's name."""
        return (f"{self.measure}.{self.name}",)


class LabelRule(Rule):
    """Counts what the classifier recognises, by its ``top`` labels; capitals don't tell labels apart.

    ``detected``: of the erased prompts' images, those with any erased label among them. ``recognised``: of the kept
    ones, those with their prompt's own label among them.
    """

    kind: Literal["label"]
    top: Whole = Field(default=1, ge=1, description="a whole number of at least 1")

    def measures(self) -> tuple[str, ...]:
        """The figures' names."""
        return (f"detected.{self.name}", f"recognised.{self.name}")


class AnyRule(Part):
    """Counts images that any of the rules before it, named here, finds something in."""

    name: Name = Field(description="letters, digits, - and _")
    kind: Literal["any"]
    measure: Name = Field(description="a figure's name")
    any_of: tuple[Name, ...] = Field(min_length=2, description="a list of rules that stand before it")

    def measures(self) -> tuple[str, ...]:
        """The figure's name."""
        return (f"{self.measure}.{self.name}",)


AnyKindOfRule = Annotated[BoxRule | ClassRule | LabelRule | AnyRule, Field(discriminator="kind")]

#: Metrics that compare an image with another runtime's; the others need the image and its prompt, or the edit alone.
PAIRED: Final = frozenset({"fid", "kid", "lpips", "psnr"})


class Metric(Part):
    """A metric that is wanted, of each group and in each variant."""

    name: Literal["clip_score", "fid", "kid", "lpips", "psnr", "weights_changed", "edit_seconds"] = Field(
        description="clip_score, fid, kid, lpips, psnr, weights_changed or edit_seconds"
    )
    model: str | None = Field(default=None, description="a model by name; demo:clip is the bundled one")
    groups: tuple[GroupName, ...] = Field(default=(), description="a list of erased and kept")
    variants: tuple[Name, ...] = Field(default=(), description='a list, such as [native, "64"]')
    #: Whose images it compares with: the unedited model's, the edited reference's.
    against: tuple[Literal["base", "reference"], ...] = Field(default=(), description="a list of base and reference")
    #: The erased prompts' mean less the kept ones'.
    difference: bool = Field(default=False, strict=True, description="true or false")

    @model_validator(mode="after")
    def _whole(self) -> Metric:
        if (self.name in PAIRED) != bool(self.against):
            raise Problem((), f"against is for {', '.join(sorted(PAIRED))}, which need it")
        if self.difference and set(self.groups) != {"erased", "kept"}:
            raise Problem(("difference",), "needs the groups erased and kept")
        return self

    def measures(self) -> tuple[str, ...]:
        """The figures' names."""
        groups = (*self.groups, "difference") if self.difference else self.groups
        return tuple(
            ".".join(part for part in (self.name, group, variant) if part)
            for group in groups or ("",)
            for variant in self.variants or ("",)
        )


class Sweep(Part):
    """An ablation: edits of one preset that differ in one figure alone, each a runtime of the run."""

    preset: Name = Field(description="a preset of excise edit")
    parameter: Literal["epochs", "ridge"] = Field(description="epochs, or ridge, the λ of RECE's eq. 8")
    values: Annotated[tuple[Real, ...], Field(min_length=2)] = Field(description="a list of two numbers or more")

    @model_validator(mode="after")
    def _usable(self) -> Sweep:
        for number, value in enumerate(self.values):
            if self.parameter == "epochs" and not (value.is_integer() and 0 <= value <= 1000):
                raise Problem(("values", number), "epochs are whole numbers from 0 to 1000")
            if self.parameter == "ridge" and not 0 < value < 1e6:
                raise Problem(("values", number), "λ is a positive number below a million")
        if len(set(self.runtimes)) < len(self.values):
            raise Problem(("values",), "each value stands once, and differs from the others in its first six digits")
        return self

    @property
    def runtimes(self) -> dict[str, float]:
        """The runtimes' names, such as ``ridge-0.001``, and their values."""
        return {f"{self.parameter}-{value:g}": value for value in self.values}


class Published(Part):
    """A published figure, and for which run it holds."""

    measure: str = Field(description="a figure's name, as the rules and metrics of the protocol give it")
    method: str = Field(min_length=1, description="text: whose figure it is")
    value: Real = Field(description="a number")
    source: str = Field(min_length=1, description="text: where it was published")
    #: Parameter → the value that the figure is for.
    when: dict[Literal["erased"], str] = Field(default={}, description="erased: LABEL")

    def figure(self) -> PaperFigure:
        """For the report."""
        return PaperFigure(measure=self.measure, method=self.method, value=self.value, source=self.source)
