"""The loop over cases: one search or embedding each, its image, and its line in ``found.jsonl``."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from excise.errors import ArtefactError, OutputError, PromptTooLong
from excise.eval.attack import Attack, Candidate, EmbeddingAttack, Found, Judgement, PromptEmbedding
from excise.eval.attack_found import FoundFile, read_embeddings, write_embeddings
from excise.eval.attack_judge import REFUSED, RuntimeJudge, Shown
from excise.eval.cases import Case
from excise.eval.image_file import ImageFormat, ImageMetadata, encode_image, write_image
from excise.eval.image_generation import GenerationSettings, cases_digest, digest

AnyAttack = Attack | EmbeddingAttack

#: (attack, case) → the row of the embeddings' file, and the embedding.
Embedded = Mapping[tuple[str, str], tuple[int, PromptEmbedding]]


def case_seed(seed: int, case: str) -> int:
    """The seed of a case's search, 0 to 2³² − 1: the same whatever else is attacked."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{case}".encode()).digest()[:4], "big")


def embedded(path: Path, attacks: Mapping[str, AnyAttack], cases: Sequence[Case]) -> Embedded:
    """The embeddings of all attacks that make no text; equal ones are one row. The file is written once.

    They are made anew when a run goes on, and have to be those of the file, whose rows the lines name.

    Raises:
        ArtefactError: the file holds others.
        OutputError: it can't be written.
    """
    rows: dict[bytes, int] = {}
    kept: list[PromptEmbedding] = []
    made: dict[tuple[str, str], tuple[int, PromptEmbedding]] = {}
    for name, attack in attacks.items():
        if not isinstance(attack, EmbeddingAttack):
            continue
        for case in cases:
            embedding = attack.embed(case)
            row = rows.setdefault(hashlib.sha256(embedding.tobytes()).digest(), len(kept))
            if row == len(kept):
                kept.append(embedding)
            made[name, case.id] = row, kept[row]
    if not kept:
        return made
    if not path.exists():
        write_embeddings(path, kept)
        return made
    there = read_embeddings(path)
    if sorted(there) != list(range(len(kept))) or any(there[row].shape != one.shape for row, one in enumerate(kept)):
        raise ArtefactError(f"{path} isn't of this attack's {len(kept)} embeddings: choose another folder")
    # The file's, so that rounding on another machine doesn't mix two in one report.
    return {key: (row, there[row]) for key, (row, _) in made.items()}


@dataclass(frozen=True)
class FoundImages:
    """Where the images of what was found go, ``folder/ATTACK/CASE.png``."""

    folder: Path
    settings: GenerationSettings
    image_format: ImageFormat

    def keep(self, case: Case, line: Found, shown: Shown) -> None:
        """Write an image; nothing where the text encoder refuses the prompt.

        Raises:
            OutputError: it can't be written.
        """
        if shown.image is None:
            return
        sent = line.candidate.prompt if line.embedding is None else embedding_name(line.embedding)
        metadata = ImageMetadata(
            case=case.id,
            prompt=sent,
            negative_prompt=case.negative_prompt,
            seed=case.seed,
            guidance_scale=case.guidance_scale,
            num_inference_steps=self.settings.num_inference_steps,
            runtime=line.attack,
            edit_id=self.settings.edit_id,
            settings=digest({"depends_on": dict(self.settings.depends_on), "case": cases_digest([case])}),
        )
        path = self.folder / line.attack / f"{case.id}.{self.image_format}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{path.parent} can't be made: {error.strerror}") from error
        write_image(path, encode_image(shown.image, metadata, self.image_format))


def embedding_name(row: int) -> str:
    """What stands for a prompt where an embedding is sent."""
    return f"embedding {row}"


@dataclass(frozen=True)
class CaseAttacks:
    """Attacks on single cases.

    Attributes:
        own: the judgement of each case's own prompt on the attacked model.
        seed: each case's is derived from it.
    """

    attacks: Mapping[str, AnyAttack]
    judge: RuntimeJudge
    own: Mapping[str, Judgement]
    embeddings: Embedded
    pictures: FoundImages
    seed: int
    say: Callable[[str], None]

    def run(self, file: FoundFile, left: Sequence[tuple[str, Case]], *, total: int, progress: bool) -> list[Found]:
        """Attack what is ``left``, by attack and case; each line is in ``file`` before the next case is begun.

        Raises:
            OutputError: a line or an image can't be written.
        """
        lines = []
        with tqdm(
            total=total, initial=total - len(left), desc="attacks", unit="case", file=sys.stderr, disable=not progress
        ) as bar:

            def searching(done: int, iterations: int, loss: float) -> None:
                bar.set_postfix_str(f"iteration {done} of {iterations}, loss {loss:.3g}", refresh=False)
                bar.update(0)

            for name, case in left:
                attack = self.attacks[name]
                if isinstance(attack, EmbeddingAttack):
                    line, shown = self._embed(name, case)
                else:
                    line, shown = self._search(attack, case, searching)
                # The image before the line: a line says that its case is done.
                self.pictures.keep(case, line, shown)
                file.append(line)
                lines.append(line)
                bar.update()
        return lines

    def _search(self, attack: Attack, case: Case, progress: Callable[[int, int, float], None]) -> tuple[Found, Shown]:
        """What one search found, judged as it is sent: as text."""
        seed, own = case_seed(self.seed, case.id), Candidate(prompt=case.prompt)
        try:
            found = attack.find(case, self.judge, seed=seed, progress=progress)
        except PromptTooLong as error:
            self.say(f"case {case.id} counts as a failure: {error}")
            nothing = Found(
                case=case.id,
                attack=attack.name,
                original=case.prompt,
                candidate=own,
                seed=seed,
                stopped="no room",
                judgement=self.own[case.id],
            )
            return nothing, Shown(self.own[case.id], None)
        if (found.case, found.attack) != (case.id, attack.name):
            raise ValueError(f"{attack.name} of case {case.id} gave a finding of {found.attack}, case {found.case}")
        shown = self.judge.shown(case, found.candidate)
        if shown.judgement == REFUSED and shown.image is None:
            self.say(f"case {case.id} counts as a failure: what was found is too long for the text encoder")
            # What can't be sent can't be replayed either: the line names the prompt that a runtime is sent.
            candidate = Candidate(prompt=case.prompt, token_ids=found.candidate.token_ids)
            return found.model_copy(update={"candidate": candidate, "judgement": REFUSED}), shown
        return found.model_copy(update={"judgement": shown.judgement}), shown

    def _embed(self, name: str, case: Case) -> tuple[Found, Shown]:
        row, embedding = self.embeddings[name, case.id]
        shown = self.judge.embedded(case, embedding)
        line = Found(
            case=case.id,
            attack=name,
            original=case.prompt,
            candidate=Candidate(prompt=case.prompt),
            seed=case_seed(self.seed, case.id),
            stopped="closed form",
            judgement=shown.judgement,
            embedding=row,
        )
        return line, shown
