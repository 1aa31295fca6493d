"""Generations a second of Ring-A-Bell's genetic search: excise against the published, row-by-row structure.

    python bench/ring_a_bell.py [--encoder demo|vit-l] [--generations N] [--every N] [--rows N] [--json]

The population is the published 200 and K = 16. excise searches; at every N-th generation the other forms are given the
very population that excise evaluates next to it, in the same process, so that all of them have the same machine:

*excise*          the search as shipped: rows that were seen are remembered, equal beginnings computed once, and rows
                  given up as soon as they can't be among the survivors.
*one at a time*   each row through the text encoder by itself, no gradients; then lists of rows are sorted, crossed and
                  mutated one by one.
*whole batch*     all rows in one forward pass that records gradients, as the published notebook does, written from a
                  reading of github.com/chiayi-hsu/Ring-A-Bell at e4585ad; then lists as above.

Both other forms evaluate every row of every generation, so their time doesn't depend on how far the search is;
``--rows`` gives them only the first rows of a population, and their time is scaled to the whole. ``vit-l`` is a CLIP
ViT-L/14 text tower with random weights. Times are the process's CPU seconds, which other processes on the machine
disturb less than the clock's; the clock's are given too.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from excise.demo import MODEL
from excise.eval.genetic_search import Generation, GeneticSettings, RememberedFitness, generations
from excise.eval.text_embedder import TorchTextEmbedder

K, POPULATION = 16, 200


def text_encoder(name: str) -> Any:
    """In float32."""
    if name == "demo":
        return CLIPTextModel.from_pretrained(MODEL / "text_encoder", dtype=torch.float32).eval()
    torch.manual_seed(0)
    return CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    ).eval()


class Tokens:
    """CLIP's framing for a random text tower, which has no tokenizer."""

    model_max_length, bos_token_id, eos_token_id, pad_token_id = 77, 49406, 49407, 49407
    all_special_ids = (49406, 49407)

    def __len__(self) -> int:
        return 49408


def rows_of(population: Tensor) -> list[Tensor]:
    return [row[None] for row in population]


def next_generation(rows: list[Tensor], losses: list[float], highest: int) -> list[Tensor]:
    """Sorted, halved, crossed and mutated row by row, as lists of rows (1, t)."""
    order = np.argsort(losses)
    parents = [rows[place] for place in order][: len(rows) // 2]
    offspring = []
    for parent in parents:
        offspring.append(parent)
        if random.random() < 0.5:
            partner, cut = random.choice(parents), random.randrange(1, K + 1)
            offspring.append(torch.cat([parent[:, :cut], partner[:, cut:]], dim=1))
            offspring.append(torch.cat([partner[:, :cut], parent[:, cut:]], dim=1))
    for row in offspring:
        if random.random() < 0.25:
            row[:, random.randrange(1, K + 1)] = random.randrange(1, highest)
    return offspring


def one_at_a_time(encoder: Any, rows: list[Tensor], target: Tensor, highest: int) -> list[float]:
    """The losses, after one generation."""
    with torch.no_grad():
        losses = [float((encoder(row)[0][0] - target).square().sum()) for row in rows]
    next_generation([row.clone() for row in rows], losses, highest)
    return losses


def whole_batch(encoder: Any, rows: list[Tensor], target: Tensor, highest: int) -> list[float]:
    """The losses, after one generation."""
    losses: list[float] = (encoder(torch.cat(rows))[0] - target).square().sum((1, 2)).detach().tolist()
    next_generation([row.clone() for row in rows], losses, highest)
    return losses


def timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """A result, its CPU seconds and the clock's."""
    clock, cpu = time.perf_counter(), time.process_time()
    result = function()
    return result, time.process_time() - cpu, time.perf_counter() - clock


def run(encoder_name: str, count: int, every: int, rows: int) -> dict[str, object]:
    encoder = text_encoder(encoder_name)
    tokenizer: Any = CLIPTokenizer.from_pretrained(MODEL / "tokenizer") if encoder_name == "demo" else Tokens()
    embedder = TorchTextEmbedder(tokenizer, encoder)
    alphabet = embedder.tokens.alphabet("all")
    rng = np.random.default_rng(0)
    # Somewhere between prompts, as a prompt with a concept vector is: the mean of 4 random rows' embeddings.
    target = embedder.embed(embedder.tokens.framed(alphabet[rng.integers(len(alphabet), size=(4, K))])).mean(0)
    fitness = RememberedFitness(
        lambda ids, bound: embedder.distances(embedder.tokens.framed(ids), target, bound=bound),
        batch_size=embedder.batch_size,
    )
    search = generations(fitness, alphabet, K, GeneticSettings(population=POPULATION, generations=count), 0)
    others = {"one at a time": one_at_a_time, "whole batch": whole_batch}
    cpu: dict[str, list[float]] = {"excise": [], **{name: [] for name in others}}
    clock: dict[str, list[float]] = {name: [] for name in cpu}
    apart, evaluated, lowest = 0.0, [], []
    for number in range(count):
        before = fitness.evaluated
        generation: Generation
        generation, used, passed = timed(lambda: next(search))
        cpu["excise"].append(used)
        clock["excise"].append(passed)
        evaluated.append(fitness.evaluated - before)
        lowest.append(generation.lowest)
        print(
            f"generation {number + 1} of {count}: {used:.2f} CPU s, {evaluated[-1]} rows", file=sys.stderr, flush=True
        )
        if number % every:
            continue
        framed = torch.from_numpy(embedder.tokens.framed(generation.population[:rows]))
        scale = POPULATION / len(framed)
        exact = {row.tobytes(): loss for row, loss in zip(generation.survivors, generation.losses, strict=True)}
        for name, form in others.items():
            call = partial(form, encoder, rows_of(framed), torch.from_numpy(target), int(alphabet.max()) + 1)
            losses, used, passed = timed(call)
            cpu[name].append(used * scale)
            clock[name].append(passed * scale)
            for row, loss in zip(generation.population, losses, strict=False):
                if (ours := exact.get(row.tobytes())) is not None:
                    apart = max(apart, abs(ours - loss) / loss)
    late = cpu["excise"][count // 2 :]
    seconds = {name: float(np.mean(values)) for name, values in cpu.items()}
    return {
        "encoder": encoder_name,
        "population": POPULATION,
        "tokens": K,
        "generations": count,
        "rows_of_the_other_forms": min(rows, POPULATION),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows_evaluated": evaluated,
        "lowest_loss": [lowest[0], lowest[-1]],
        "largest_relative_difference_of_losses": apart,
        "cpu_seconds_a_generation": {**seconds, "excise, second half": float(np.mean(late))},
        "clock_seconds_a_generation": {name: float(np.mean(values)) for name, values in clock.items()},
        "cpu_times_as_fast": {name: seconds[name] / seconds["excise"] for name in others},
        "cpu_times_as_fast_second_half": {name: seconds[name] / float(np.mean(late)) for name in others},
        "clock_times_as_fast": {name: float(np.mean(clock[name]) / np.mean(clock["excise"])) for name in others},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--encoder", choices=("demo", "vit-l"), default="demo", help="the text encoder (demo)")
    parser.add_argument("--generations", type=int, default=100, metavar="N", help="of the search (100)")
    parser.add_argument("--every", type=int, default=20, metavar="N", help="generations between the other forms' (20)")
    parser.add_argument(
        "--rows", type=int, default=POPULATION, metavar="N", help="that the other forms are given (all)"
    )
    arguments = parser.parse_args()
    if min(arguments.generations, arguments.every, arguments.rows) < 1:
        parser.error("--generations, --every and --rows take 1 or more")
    result = run(arguments.encoder, arguments.generations, arguments.every, arguments.rows)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    for name, value in result.items():
        if isinstance(value, dict):
            print(name.replace("_", " "))
            for key, number in value.items():
                print(f"  {key:<24}{number:.4g}")
        elif name != "rows_evaluated":
            print(f"{name.replace('_', ' '):<44}{value}")


if __name__ == "__main__":
    main()
