"""How long an edit takes and how exact it is: excise against the published, layer-by-layer form.

    python bench/closed_form.py [--json] [--repeat N] [--layers N] [--text-encoder] [--device cpu|cuda]

The shapes are Stable Diffusion 1.4's: K and V of 16 cross-attention layers, 768 wide, 77 tokens. Weights and
layer-normed embeddings are random, from a seed. UCE and three epochs of RECE erase one concept and keep one prompt.

*excise*     one transform for all layers, solved in float64; at the end ``W + W (T − I)`` for every weight, in float32.
*products*   what no such method can do without, as excise does them: Σ WᵀW in float64, and W T in float32.
*published*  float32, written from a reading of github.com/CharlesGong12/RECE at 403a67f: for every weight it maps the
             tokens by all weights and uses one of the results (timed apart as ``published_unused``), sums outer
             products token by token, and inverts. It also embeds the prompts again for every weight: ``--text-encoder``
             does that with a random CLIP ViT-L/14 text tower, and lets excise embed them once. Left out in its favour:
             it copies the modules that it edits.
*reference*  float64, layer by layer, with solves instead of inverses: what both errors are measured against.

On CUDA everything is on the GPU from the start, and each time ends when the GPU has finished; one run of each form goes
before, since the first calls load kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from excise.edit.gram import gram
from excise.edit.rece import EPOCH_SCALES, rece
from excise.edit.tokens import Concept, last_subject_pairs
from excise.edit.transform import Step, Transform
from excise.edit.uce import Scales

WIDTHS = (320, 320, 640, 640, 1280, 1280, 1280, 1280, 1280, 1280, 640, 640, 640, 320, 320, 320)
D, TOKENS, EPOCHS, RIDGE = 768, 77, 3, 0.1
UCE_SCALES = Scales(1.0, keep=1.0, ridge=0.5)

Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Problem:
    """Weights and embeddings, all float32."""

    weights: list[Tensor]
    concepts: list[Concept]
    kept: Tensor


def problem(widths: Sequence[int], seed: int, *, dim: int = D, concepts: int = 1) -> Problem:
    """Random inputs in the shapes of cross-attention layers of these ``widths``; the kept prompt is the target too."""
    generator = torch.Generator("cpu").manual_seed(seed)
    weights = [
        torch.randn(width, dim, generator=generator, device="cpu") * dim**-0.5
        for width in widths
        for _projection in ("k", "v")
    ]
    blank, *tokens = (
        torch.nn.functional.layer_norm(torch.randn(TOKENS, dim, generator=generator, device="cpu"), (dim,))
        for _prompt in range(concepts + 1)
    )
    # Drawn on the CPU, so that every device has the same.
    blank, *tokens = (each.to(torch.get_default_device()) for each in (blank, *tokens))
    concepts_of = [Concept(each, blank, tokens_length=4, target_length=2) for each in tokens]
    return Problem([weight.to(torch.get_default_device()) for weight in weights], concepts_of, blank)


def excise(given: Problem, epochs: int = EPOCHS) -> list[Tensor]:
    """The edited weights, float32."""
    result = rece(
        given.weights,
        given.concepts,
        [given.kept],
        uce_scales=UCE_SCALES,
        epoch_scales=EPOCH_SCALES,
        epochs=epochs,
        ridge=RIDGE,
    )
    return [result.transform.on_weight(weight, site) for site, weight in enumerate(given.weights)]


class Published:
    """The layer-by-layer form in float32, with outer products and inverses.

    Attributes:
        unused: seconds spent on values that nothing reads.
        encoding: seconds spent on embedding prompts again.
    """

    def __init__(self, encode: Callable[[], object] | None) -> None:
        self.unused, self.encoding = 0.0, 0.0
        self._encode = encode

    def __call__(self, given: Problem, epochs: int = EPOCHS) -> list[Tensor]:
        """The edited weights."""
        keep: Pairs = [(given.kept, given.kept)]
        erase = [last_subject_pairs(concept) for concept in given.concepts]
        weights = self._edit(given.weights, erase, keep, UCE_SCALES, passes=2)
        for epoch in range(1, epochs + 1):
            progress(f"published: epoch {epoch} of {epochs}")
            erase = [(self._derive(weights, given.weights, c.tokens), c.target) for c in given.concepts]
            weights = self._edit(weights, erase, keep, EPOCH_SCALES, passes=1)
        return weights

    def _edit(self, weights: list[Tensor], erased: Pairs, kept: Pairs, scales: Scales, passes: int) -> list[Tensor]:
        """``passes`` of the text encoder for each weight: for the kept prompt, and in UCE's stage for the concept."""
        edited = []
        for site, weight in enumerate(weights):
            if self._encode is not None:
                self.encoding += sum(seconds(self._encode) for _pass in range(passes))
            numerator, normal = scales.ridge * weight, scales.ridge * torch.eye(D)
            for scale, pairs in ((scales.erase, erased), (scales.keep, kept)):
                for tokens, targets in pairs:
                    numerator = numerator + scale * self._outer(self._value(weights, site, targets), tokens)
                    normal = normal + scale * self._outer(tokens, tokens)
            edited.append(numerator @ torch.inverse(normal))
        return edited

    def _value(self, weights: list[Tensor], site: int, targets: Tensor) -> Tensor:
        value = targets @ weights[site].T
        self.unused += seconds(lambda: [targets @ w.T for other, w in enumerate(weights) if other != site])
        return value

    @staticmethod
    def _outer(left: Tensor, right: Tensor) -> Tensor:
        return (left[:, :, None] @ right[:, None, :]).sum(dim=0)

    @staticmethod
    def _derive(edited: list[Tensor], original: list[Tensor], tokens: Tensor) -> Tensor:
        normal, cross = RIDGE * torch.eye(D), torch.zeros(D, D)
        for new, old in zip(edited, original, strict=True):
            normal = normal + new.T @ new
            cross = cross + new.T @ old
        return tokens @ (torch.inverse(normal) @ cross).T


def reference(given: Problem) -> list[Tensor]:
    """The edited weights in float64, layer by layer, with solves."""
    original = [weight.double() for weight in given.weights]
    (concept,) = given.concepts
    tokens, target, kept = concept.tokens.double(), concept.target.double(), given.kept.double()
    identity = torch.eye(D, dtype=torch.float64)

    def edit(weights: list[Tensor], source: Tensor, aim: Tensor, scales: Scales) -> list[Tensor]:
        normal = scales.erase * source.T @ source + scales.keep * kept.T @ kept + scales.ridge * identity
        right = scales.erase * aim.T @ source + scales.keep * kept.T @ kept + scales.ridge * identity
        factor, pivots = torch.linalg.lu_factor(normal)
        return [torch.linalg.lu_solve(factor, pivots, weight @ right, left=False) for weight in weights]

    source, aim = last_subject_pairs(concept)
    weights = edit(original, source.double(), aim.double(), UCE_SCALES)
    for _epoch in range(EPOCHS):
        normal, right = RIDGE * identity, torch.zeros(D, TOKENS, dtype=torch.float64)
        for new, old in zip(weights, original, strict=True):
            normal, right = normal + new.T @ new, right + new.T @ (old @ tokens.T)
        weights = edit(weights, torch.linalg.solve(normal, right).T, target, EPOCH_SCALES)
    return weights


def text_encoder(seed: int) -> Callable[[], object]:
    """One pass of two prompts through a random text tower in the shape of Stable Diffusion 1.4's."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    config = CLIPTextConfig(hidden_size=D, intermediate_size=4 * D, num_hidden_layers=12, num_attention_heads=12)
    model = CLIPTextModel(config).eval()
    tokens = torch.randint(config.vocab_size, (2, TOKENS))
    return lambda: model(tokens)


def relative_error(weights: list[Tensor], exact: list[Tensor]) -> float:
    """Frobenius, over all weights together."""
    difference = sum(
        float((ours.double() - theirs).square().sum()) for ours, theirs in zip(weights, exact, strict=True)
    )
    return float((difference / sum(float(theirs.square().sum()) for theirs in exact)) ** 0.5)


def seconds(function: Callable[[], object]) -> float:
    """How long a call takes, on CUDA until the GPU has finished."""
    finish = torch.cuda.synchronize if torch.get_default_device().type == "cuda" else lambda: None
    finish()
    start = time.perf_counter()
    function()
    finish()
    return time.perf_counter() - start


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def run(layers: int, repeat: int, seed: int, *, with_text_encoder: bool) -> dict[str, object]:
    """All timings (seconds, medians; the published form runs once) and errors."""
    encode = text_encoder(seed) if with_text_encoder else None
    given = problem(WIDTHS[:layers], seed)
    progress("reference")
    exact = reference(given)
    times: dict[str, list[float]] = {"excise": [], "excise_text_encoder": [], "gram": [], "application": []}
    # A dense T: the values don't matter to the time, only that they are no special case.
    scales = {"uce_scales": UCE_SCALES, "epochs": 0, "ridge": RIDGE}
    step = Transform((Step.of(rece(given.weights, given.concepts, [given.kept], **scales).transform.matrix()),), D)
    if torch.get_default_device().type == "cuda":
        excise(given)
    for number in range(repeat):
        progress(f"excise and products: run {number + 1} of {repeat}")
        times["excise_text_encoder"].append(0.0 if encode is None else seconds(encode))
        times["excise"].append(seconds(lambda: excise(given)))
        times["gram"].append(seconds(lambda: gram(given.weights)))
        times["application"].append(seconds(lambda: [step.on_weight(weight) for weight in given.weights]))
    error = relative_error(excise(given), exact)
    progress("published: UCE")
    if torch.get_default_device().type == "cuda":
        Published(encode)(given)
    published, weights = Published(encode), []
    total = seconds(lambda: weights.extend(published(given)))
    median = {name: statistics.median(values) for name, values in times.items()}
    whole = median["excise"] + median["excise_text_encoder"]
    products = median["gram"] + median["application"]
    return {
        "layers": layers,
        "matrices": 2 * layers,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.get_default_device().type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "repeat": repeat,
        "seed": seed,
        "text_encoder": with_text_encoder,
        "seconds": {
            **median,
            "products": products,
            "published": total,
            "published_unused": published.unused,
            "published_text_encoder": published.encoding,
        },
        "published_over_excise": total / whole,
        "published_without_unused_over_excise": (total - published.unused) / whole,
        "excise_over_products": median["excise"] / products,
        "relative_error": {"excise": error, "published": relative_error(weights, exact)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="runs of excise and of the products (3)")
    parser.add_argument("--layers", type=int, default=16, metavar="N", help="cross-attention layers, 1 to 16 (16)")
    parser.add_argument("--text-encoder", action="store_true", help="embed prompts as often as each form does")
    parser.add_argument("--device", default="cpu", help="where both forms run (cpu)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and embeddings (0)")
    arguments = parser.parse_args()
    if arguments.repeat < 1 or not 1 <= arguments.layers <= len(WIDTHS):
        parser.error(f"--repeat takes 1 or more, --layers 1 to {len(WIDTHS)}")
    # Also as a context PyTorch's default device costs a little at every call: not where it is the default anyway.
    place = contextlib.nullcontext() if arguments.device == "cpu" else torch.device(arguments.device)
    with torch.inference_mode(), place:
        result = run(arguments.layers, arguments.repeat, arguments.seed, with_text_encoder=arguments.text_encoder)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['matrices']} weights, torch {result['torch']}, {result['threads']} threads, {result['device']}")
    for group in ("seconds", "relative_error"):
        figures = result[group]
        assert isinstance(figures, dict)
        print(group.replace("_", " "))
        for name, value in figures.items():
            print(f"  {name:<40}{value:.4g}")
    for name in ("published_over_excise", "published_without_unused_over_excise", "excise_over_products"):
        print(f"{name.replace('_', ' '):<42}{result[name]:.3g}")


if __name__ == "__main__":
    main()
