"""The commands ``excise attack …``: how often an erased concept can be brought back, and on what is served."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from excise.cli_attack_options import attack_options, budget_options, concept_options, run_options
from excise.cli_attack_run import chosen_protocol, run_attack, run_replay
from excise.console import needs, result

if TYPE_CHECKING:
    from excise.eval.attack_session import AttackPlan


similarity_option = click.option(
    "--similarity", required=True, metavar="CLIP", help="demo:clip, or a CLIP's folder; published: ViT-H/14."
)


@click.group("attack")
def attack() -> None:
    """Bring an erased concept back, to measure an edit; replay what was found on what is served.

    Every attack first looks at the unedited model's images of the protocol's erased prompts, and leaves out those
    that don't show the concept; then at the attacked model's ("pre": they need no attack); and attacks the rest
    ("post"). The success rate is (pre + post) / N, by the protocol's detector, rule and threshold.

    What was found is in OUT/found.jsonl, one line a case. A run that was ended goes on with the same command.

    \b
    Examples:
      excise attack unlearn-diff-atk --model SD_FOLDER --edit e.safetensors --protocol nudity-142
          --prompts nudity.csv --all-cases --out attacked --device cuda
      excise attack closed-form --model demo:model --edit e.safetensors --protocol demo-weapons --sample 24 --out cf
      excise attack replay attacked --runtime served=triton:http://localhost:8000/excise
          --protocol nudity-142 --prompts nudity.csv --out replayed
    """


@attack.command("ring-a-bell", short_help="A genetic search for tokens, by the text encoder alone.")
@attack_options
@concept_options
@budget_options({"tokens": 16, "population": 200, "generations": 3000})
@click.option("--patience", type=click.IntRange(1), metavar="N", help="Stop after N generations without a lower loss.")
def ring_a_bell(
    budget: dict[str, Any], eta: float, patience: int | None, concept: dict[str, Any], **given: Any
) -> None:
    """Ring-A-Bell: tokens whose embedding is nearest to the prompt's with the concept added (arXiv 2310.10012).

    Black box: a genetic search that needs the unedited model's text encoder alone. Published: --eta 3 for nudity, 0.9
    for Van Gogh.

    \b
    Example:
      excise attack ring-a-bell --model demo:model --edit e.safetensors --protocol demo-weapons --sample 6
          --concept "a gun" --generations 100 --out ring
    """

    def plan() -> AttackPlan:
        from excise.eval.attack_concept import ConceptSource
        from excise.eval.attack_plans import ring_a_bell as planned
        from excise.eval.ring_a_bell import RingABellSettings

        return planned(ConceptSource(**concept), RingABellSettings(**budget, eta=eta, patience=patience))

    run_attack(plan, **given)


@attack.command("ring-a-bell-embedding", short_help="RECE's variant, which makes no text.")
@attack_options
@concept_options
def ring_a_bell_embedding(eta: float, concept: dict[str, Any], **given: Any) -> None:
    """RECE's variant of Ring-A-Bell: the concept is added to the prompt's embedding (arXiv 2407.12383).

    The 13.38 % that its paper gives for Ring-A-Bell are of this one. It makes no text: it can be replayed on torch:
    and onnx: folders, not on servers.

    \b
    Example:
      excise attack ring-a-bell-embedding --model SD_FOLDER --edit e.safetensors --protocol nudity-142
          --prompts nudity.csv --all-cases --pairs nudity_pairs.csv --out ring
    """

    def plan() -> AttackPlan:
        from excise.eval.attack_concept import ConceptSource
        from excise.eval.attack_plans import ring_a_bell_embedding as planned

        return planned(ConceptSource(**concept), eta)

    run_attack(plan, **given)


@attack.command("p4d-n", short_help="P4D with 16 learnable tokens.")
@attack_options
@similarity_option
@budget_options({"tokens": 16, "iterations": 3000, "evaluate_every": 50, "learning_rate": 0.1})
def p4d_n(similarity: str, budget: dict[str, Any], **given: Any) -> None:
    """P4D-N: 16 learnable tokens under which the edited model predicts the unedited one's noise (arXiv 2309.06135).

    White box: it needs the unedited model too. The published budget is the default, and hours a prompt on a CPU.

    \b
    Example:
      excise attack p4d-n --model demo:model --edit e.safetensors --protocol demo-weapons --sample 6
          --iterations 100 --similarity demo:clip --out p4d
    """
    _p4d("n", similarity, budget, given)


@attack.command("p4d-k", short_help="P4D with learnable tokens within the prompt.")
@attack_options
@similarity_option
@budget_options({"every": 3, "iterations": 3000, "evaluate_every": 50, "learning_rate": 0.1})
def p4d_k(similarity: str, budget: dict[str, Any], **given: Any) -> None:
    """P4D-K: as p4d-n, with a learnable token after every 3 tokens of the prompt (arXiv 2309.06135).

    \b
    Example:
      excise attack p4d-k --model demo:model --edit e.safetensors --protocol demo-weapons --sample 6
          --iterations 100 --similarity demo:clip --out p4d
    """
    _p4d("k", similarity, budget, given)


@attack.command("unlearn-diff-atk", short_help="A learnable prefix of few tokens.")
@attack_options
@budget_options({"tokens": 5, "timesteps": 50, "iterations": 40, "learning_rate": 0.01})
def unlearn_diff_atk(budget: dict[str, Any], **given: Any) -> None:
    """UnlearnDiffAtk: a prefix of few tokens under which the edited model denoises the erased image (arXiv 2310.11868).

    White box. The published budget is the default: 50 timesteps of 40 iterations, and an image after each timestep.

    \b
    Example:
      excise attack unlearn-diff-atk --model demo:model --edit e.safetensors --protocol demo-weapons --sample 6
          --timesteps 5 --iterations 10 --out uda
    """

    def plan() -> AttackPlan:
        from excise.eval.attack_plans import unlearn_diff_atk as planned
        from excise.eval.unlearn_diff_atk import UnlearnDiffAtkSettings

        return planned(UnlearnDiffAtkSettings(**budget))

    run_attack(plan, **given)


@attack.command("closed-form", short_help="The embedding that best regenerates a prompt, fed to the UNet.")
@attack_options
@click.option("--ridge", type=float, default=0.1, show_default=True, help="λ of RECE's eq. 8.")
@click.option(
    "--radius",
    "radii",
    type=float,
    multiple=True,
    default=(1.0, 2.0, 4.0),
    show_default=True,
    metavar="R",
    help="A bound, in multiples of each token's norm; repeat it.",
)
@click.option(
    "--control/--no-control", default=True, show_default=True, help="Random embeddings of eq. 8's norms, too."
)
def closed_form(ridge: float, radii: tuple[float, ...], control: bool, **given: Any) -> None:
    """The embedding that best regenerates each prompt, fed to the UNet: RECE's eq. 8, and the certificate's optimum.

    It needs no search, and no search over embeddings of that norm comes nearer. It gives no text: it can be replayed
    on torch: and onnx: folders, not on servers.

    \b
    Example:
      excise attack closed-form --model demo:model --edit e.safetensors --protocol demo-weapons --sample 24
          --radius 1 --radius 2 --out closed
    """

    def plan() -> AttackPlan:
        from excise.eval.attack_plans import closed_form as planned

        return planned(ridge=ridge, radii=radii, control=control, seed=given["seed"])

    run_attack(plan, **given)


@attack.command("replay", short_help="Send what was found to what is served.")
@click.argument("found", type=click.Path(path_type=Path), metavar="FOUND")
@run_options
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    required=True,
    metavar="NAME=KIND:PLACE",
    help="What is served, as in excise eval; repeat it.",
)
def replay(found: Path, runtimes: tuple[str, ...], out: Path, batch_size: int, as_json: bool, **chosen: Any) -> None:
    """Send what an attack found (FOUND, its found.jsonl or folder) to what is served, and judge the images.

    Text goes to any runtime: torch:DIR, onnx:DIR, triton:URL/MODEL, openai:URL. Embeddings go to torch:DIR and
    onnx:DIR; not to an export whose edit is behind its text encoder, which they would pass by. Every runtime's success
    rate stands beside the attacked model's own, with the number of cases whose outcome differs.

    \b
    Example:
      excise attack replay attacked --runtime served=onnx:sd-onnx --protocol nudity-142 --prompts nudity.csv
          --out replayed
    """
    with needs("eval"):
        from excise.eval.attack_table import replay_table
    choice, models = chosen_protocol(**chosen)
    report = run_replay(found, runtimes, out, choice, models, batch_size)
    result(report.model_dump(mode="json"), replay_table(report), as_json)


def _p4d(variant: Any, similarity: str, budget: dict[str, Any], given: dict[str, Any]) -> None:
    def plan() -> AttackPlan:
        from excise.eval.attack_plans import p4d
        from excise.eval.p4d import P4DSettings

        return p4d(variant, P4DSettings(**budget), similarity)

    run_attack(plan, **given)
