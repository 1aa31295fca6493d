"""The loop goes on after any stop as if there had been none, and says what went wrong at which iteration."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from excise.edit.draws import generator
from excise.edit.training import fit
from excise.edit.training_folder import TrainingFolder
from excise.errors import NumericsError, OutputError, UsageError

Weights = dict[str, torch.nn.Parameter]


def problem() -> tuple[Weights, torch.optim.Optimizer, Callable[[int], Tensor]]:
    """A small regression with draws by iteration; Adam has state to lose."""
    start = torch.Generator().manual_seed(0)
    weights = {name: torch.nn.Parameter(torch.randn(3, 3, generator=start)) for name in ("b.weight", "a.weight")}
    optimizer = torch.optim.AdamW(weights.values(), lr=0.05, weight_decay=0.01)

    def loss_of(iteration: int) -> Tensor:
        x = torch.randn(5, 3, generator=generator(1, "toy", iteration))
        return (torch.tanh(x @ weights["a.weight"]) @ weights["b.weight"] - x).square().mean()

    return weights, optimizer, loss_of


def run(folder: Path | None, iterations: int, *, every: int = 4, identity: str = "one") -> tuple[Weights, list[float]]:
    weights, optimizer, loss_of = problem()
    store = None if folder is None else TrainingFolder(folder, {"name": identity, "figures": {"rate": 0.05}})
    losses = fit(weights, optimizer, loss_of, iterations=iterations, folder=store, every=every, max_norm=1.0)
    return weights, list(losses)


def equal(one: Weights, other: Weights) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_loss_falls_and_folders_change_nothing(tmp_path: Path) -> None:
    plain, losses = run(None, 40)
    assert losses[-1] < losses[0] / 2
    kept, same = run(tmp_path / "kept", 40)
    assert same == losses
    assert equal(plain, kept)


@pytest.mark.parametrize("stop", [1, 4, 6, 11])
def test_a_resumed_run_is_an_uninterrupted_one(tmp_path: Path, stop: int) -> None:
    whole, losses = run(None, 11)
    run(tmp_path / "t", stop)
    resumed, again = run(tmp_path / "t", 11)
    assert again == losses
    assert equal(whole, resumed)
    assert not equal(whole, run(None, 10)[0])


def test_without_the_optimisers_state_it_would_be_another_run(tmp_path: Path) -> None:
    run(tmp_path / "t", 6)
    store = TrainingFolder(tmp_path / "t", {"name": "one", "figures": {"rate": 0.05}})
    found = store.read("state")
    assert found is not None
    tensors = {key: torch.zeros_like(value) if "exp_avg" in key else value for key, value in found[0].items()}
    store.write("state", tensors, found[1])
    assert not equal(run(tmp_path / "t", 11)[0], run(None, 11)[0])


class Stop(BaseException):
    """Ctrl-C, as far as the loop can tell."""


def test_an_interrupted_iteration_is_taken_again(tmp_path: Path) -> None:
    weights, optimizer, loss_of = problem()
    store = TrainingFolder(tmp_path / "t", {"name": "one", "figures": {"rate": 0.05}})

    def stopping(iteration: int) -> Tensor:
        if iteration == 6:
            raise Stop
        return loss_of(iteration)

    with pytest.raises(Stop):
        fit(weights, optimizer, stopping, iterations=11, folder=store, every=100, max_norm=1.0)
    said: list[str] = []
    weights, optimizer, loss_of = problem()
    fit(weights, optimizer, loss_of, iterations=11, folder=store, max_norm=1.0, progress=said.append)
    assert said == [f"resuming after iteration 6 of 11, from {tmp_path / 't'}"]
    assert equal(weights, run(None, 11)[0])


def test_a_stop_within_the_optimisers_step_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    weights, optimizer, loss_of = problem()
    store = TrainingFolder(tmp_path / "t", {"name": "one", "figures": {"rate": 0.05}})
    step, calls = optimizer.step, 0

    def stopping() -> None:
        nonlocal calls
        calls += 1
        if calls == 7:
            with torch.no_grad():
                weights["a.weight"].zero_()
            raise Stop
        step()

    optimizer.step = stopping  # type: ignore[assignment, method-assign]
    with pytest.raises(Stop):
        fit(weights, optimizer, loss_of, iterations=11, folder=store, every=4, max_norm=1.0)
    assert equal(run(tmp_path / "t", 11)[0], run(None, 11)[0])


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, os.getcwd())
from excise.edit.training_folder import TrainingFolder
from excise.edit.training import fit
from tests.edit.test_training import problem
weights, optimizer, loss_of = problem()
def dying(iteration):
    if iteration == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss_of(iteration)
folder = TrainingFolder(Path(sys.argv[1]), {"name": "one", "figures": {"rate": 0.05}})
fit(weights, optimizer, dying, iterations=11, folder=folder, every=4, max_norm=1.0)
"""


def test_a_killed_run_resumes(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "t")], cwd=root, check=False, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    resumed, losses = run(tmp_path / "t", 11)
    whole, expected = run(None, 11)
    assert losses == expected
    assert equal(resumed, whole)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_iteration(tmp_path: Path, bad: float) -> None:
    weights, optimizer, loss_of = problem()
    store = TrainingFolder(tmp_path / "t", {"a": 1})
    with pytest.raises(NumericsError, match=f"the loss is {bad} at iteration 8: give .* below 0.05"):
        fit(
            weights,
            optimizer,
            lambda n: loss_of(n) * (bad if n == 7 else 1),
            iterations=11,
            folder=store,
            every=100,
        )
    assert not (tmp_path / "t" / "state.safetensors").exists()


def test_a_gradient_that_is_not_finite_names_its_iteration() -> None:
    weights = {"w": torch.nn.Parameter(torch.zeros(2))}
    optimizer = torch.optim.Adam(weights.values(), lr=0.1)
    with pytest.raises(NumericsError, match="the gradient's norm is nan at iteration 1"):
        fit(weights, optimizer, lambda n: weights["w"].square().sum().sqrt(), iterations=2)


FULL = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_memory_says_how_to_go_on(tmp_path: Path, error: Exception) -> None:
    weights, optimizer, loss_of = problem()
    store = TrainingFolder(tmp_path / "t", {"name": "one", "figures": {"rate": 0.05}})

    def filling(iteration: int) -> Tensor:
        if iteration == 5:
            raise error
        return loss_of(iteration)

    with pytest.raises(UsageError, match=r"out of memory at iteration 6 of 11; .* goes on after iteration 5: free"):
        fit(weights, optimizer, filling, iterations=11, folder=store, max_norm=1.0)
    assert equal(run(tmp_path / "t", 11)[0], run(None, 11)[0])


def test_other_errors_stay_what_they_are() -> None:
    weights, optimizer, _ = problem()

    def broken(iteration: int) -> Tensor:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        fit(weights, optimizer, broken, iterations=1)


def test_another_trainings_folder_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "t", 4)
    with pytest.raises(UsageError, match=r'another training \(name is "one" there, "two" here\): name another folder'):
        run(tmp_path / "t", 4, identity="two")
    with pytest.raises(UsageError, match=r"figures\.rate is 0\.05 there, absent here"):
        TrainingFolder(tmp_path / "t", {"name": "one", "figures": {}})
    with pytest.raises(UsageError, match="is at iteration 4 already: give --iterations 4 or more"):
        run(tmp_path / "t", 3)
    assert len(run(tmp_path / "t", 4)[1]) == 4


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds something else than a training"):
        run(tmp_path, 4)
    with pytest.raises(OutputError, match=r"can't be written"):
        run(tmp_path / "notes.txt", 4)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_damage_is_told(tmp_path: Path) -> None:
    run(tmp_path / "t", 4)
    state = tmp_path / "t" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-10])
    with pytest.raises(OutputError, match=r"state\.safetensors can't be read, it is damaged: remove it"):
        run(tmp_path / "t", 8)
    (tmp_path / "t" / "training.json").write_text("{")
    with pytest.raises(OutputError, match=r"training\.json can't be read: remove"):
        run(tmp_path / "t", 8)


def test_a_checkpoint_that_can_not_be_written_leaves_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TrainingFolder(tmp_path / "t", {"a": 1})
    store.write("state", {"x": torch.ones(1)}, {"n": 1})

    def full(*arguments: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("excise.edit.training_folder.save_file", full)
    with pytest.raises(OutputError, match=r"no space left on the disk\): make room"):
        store.write("state", {"x": torch.zeros(1)}, {"n": 2})
    found = store.read("state")
    assert found is not None
    assert (float(found[0]["x"]), found[1]) == (1.0, {"n": 1})
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == ["state.safetensors", "training.json"]


def test_draws_depend_on_their_purpose_alone() -> None:
    first = torch.randn(4, generator=generator(0, "esd", 3))
    assert torch.equal(first, torch.randn(4, generator=generator(0, "esd", 3)))
    others = [(0, "esd", 4), (1, "esd", 3), (0, "ca", 3), (0, "esd", "3", "")]
    assert not any(torch.equal(first, torch.randn(4, generator=generator(*each))) for each in others)
