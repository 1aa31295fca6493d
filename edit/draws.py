"""Random draws that depend on what they are for, and not on what was drawn before.

The draws of step 57 are the same in a run that began at step 0 and in one that resumed at step 50: there is no state of
a generator to keep. They are made on the CPU, so that every device trains on the same numbers.
"""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A generator on the CPU for one purpose, such as ``("anchor image", 3)``, of a run's ``seed``."""
    text = "\0".join(str(part) for part in (seed, *purpose))
    state = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(state)
