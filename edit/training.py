"""The loop that every trained method shares: steps of an optimiser that can be stopped at any time and go on.

A method is a function from the number of an iteration to its loss, with draws that depend on that number alone
(``excise.edit.draws``). So a run that was stopped and resumed takes the same steps as one that wasn't: on the CPU, with
as many threads, bit for bit. A GPU's sums may differ from one run to the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from tqdm import tqdm

from excise.edit.training_folder import TrainingFolder
from excise.errors import NumericsError, UsageError

#: Iterations between two checkpoints.
EVERY = 50

_STATE = "state"


def fit(
    weights: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[int], Tensor],
    *,
    iterations: int,
    folder: TrainingFolder | None = None,
    every: int = EVERY,
    max_norm: float | None = None,
    description: str = "training",
    progress: Callable[[str], None] = lambda message: None,
) -> tuple[float, ...]:
    """Train ``weights`` in place, from where ``folder`` has got to; a bar on stderr tells the loss.

    Args:
        weights: by name; each is one of the optimiser's.
        optimizer: new.
        loss_of: the loss of an iteration, counted from 0: a scalar with a gradient.
        iterations: in all, those done before included.
        folder: where checkpoints go; None keeps none.
        every: iterations between two of them; there is another at the end, and where an iteration is interrupted.
        max_norm: gradients are scaled down to this norm, all of them together; None leaves them.
        description: of the bar.
        progress: told where the run resumes.

    Returns:
        The loss of every iteration.

    Raises:
        NumericsError: a loss or a gradient that isn't finite.
        UsageError: ``folder`` is beyond ``iterations``, or the memory is full.
        OutputError: a checkpoint can't be read or written.
    """
    losses = _resume(weights, optimizer, folder)
    done = len(losses)
    if done > iterations:
        where = folder.path if folder else ""
        raise UsageError(f"{where} is at iteration {done} already: give --iterations {done} or more, or another folder")
    if folder is not None and done:
        progress(f"resuming after iteration {done} of {iterations}, from {folder.path}")
    saved = done
    with tqdm(total=iterations, initial=done, desc=description, unit="it") as bar:
        for iteration in range(done, iterations):
            whole = True
            try:
                value = _gradients(weights, optimizer, loss_of, iteration, max_norm)
                whole = False
                optimizer.step()
            except NumericsError:
                raise
            except BaseException as error:
                # Before the optimiser's step the weights are those of the last iteration; within it they are neither.
                if whole and folder is not None and iteration > saved:
                    _save(weights, optimizer, folder, losses)
                    saved = iteration
                if _memory_is_full(error):
                    kept = f"; {folder.path} goes on after iteration {saved}" if folder and saved else ""
                    raise UsageError(
                        f"out of memory at iteration {iteration + 1} of {iterations}{kept}: free some, or name another "
                        "--device, and run the same command again"
                    ) from error
                raise
            losses.append(value)
            if folder is not None and ((iteration + 1) % every == 0 or iteration + 1 == iterations):
                _save(weights, optimizer, folder, losses)
                saved = iteration + 1
            bar.set_postfix(loss=f"{value:.4g}", refresh=False)
            bar.update()
    return tuple(losses)


def _gradients(
    weights: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[int], Tensor],
    iteration: int,
    max_norm: float | None,
) -> float:
    """Leave an iteration's gradients in the weights; the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss = loss_of(iteration)
    value = float(loss.detach())
    if math.isfinite(value):
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(torch.nn.utils.clip_grad_norm_(weights.values(), math.inf if max_norm is None else max_norm))
    if not math.isfinite(value) or not math.isfinite(norm):
        what = f"the loss is {value}" if not math.isfinite(value) else f"the gradient's norm is {norm}"
        rate = optimizer.param_groups[0]["lr"]
        raise NumericsError(
            f"{what} at iteration {iteration + 1}: give a --parameter learning_rate below {rate:g}, "
            "and an empty folder of checkpoints"
        )
    return value


def _memory_is_full(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # The CPU's allocator raises nothing more special.
    return isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "out of memory" in str(error))


def _save(
    weights: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    folder: TrainingFolder,
    losses: list[float],
) -> None:
    tensors: dict[str, Tensor] = {f"weights/{name}": weight for name, weight in weights.items()}
    for name, weight in weights.items():
        tensors |= {f"{key}/{name}": value for key, value in optimizer.state[weight].items()}
    folder.write(_STATE, tensors, {"losses": losses})


def _resume(
    weights: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, folder: TrainingFolder | None
) -> list[float]:
    """Put a folder's last state into the weights and the optimiser; the losses up to it."""
    found = folder.read(_STATE) if folder is not None else None
    if found is None:
        return []
    tensors, document = found
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        by_name.setdefault(name, {})[kind] = tensor
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(by_name[name].pop("weights"))
    names = {id(weight): name for name, weight in weights.items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = optimizer.state_dict()
    state["state"] = {number: by_name[names[id(each)]] for number, each in enumerate(parameters)}
    optimizer.load_state_dict(state)
    return [float(loss) for loss in document["losses"]]
