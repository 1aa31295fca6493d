"""The bundled model as an exported folder, put together on first use: no PyTorch, no ONNX library, no network.

``demo/onnx`` holds the graphs (``bundle_onnx`` made them) and ``demo/model`` the weights. ONNX Runtime wants both in
one folder, and so they are copied, 30 MB, to a folder of the user's cache.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from excise.demo import MODEL
from excise.errors import OutputError
from excise.manifest import NAME, hash_file, verify
from excise.output import new_folder

GRAPHS = Path(__file__).parent / "onnx"

#: The name, beside each graph, of the file that it reads its weights from.
WEIGHTS = "weights.safetensors"

#: Whose weights each component's graph reads.
STORED = {
    "text_encoder": "text_encoder/model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae_decoder": "vae/diffusion_pytorch_model.safetensors",
}


def bundled(cache: Path | None = None, *, say: Callable[[str], None] = lambda message: None) -> Path:
    """The exported folder, a bank with the base and two edits: made where it isn't there, or isn't as it should be.

    Args:
        cache: the folder to put it in; ``excise/demo`` in the user's cache where None. A folder of the system's
            temporary files takes its place where that can't be written.
        say: told what is done, where anything is.

    Raises:
        OutputError: neither place can be written.
    """
    name = f"onnx-{hash_file(GRAPHS / NAME)[:16]}"
    folder = (cache or _cache()) / name
    if folder.is_dir() and not verify(folder):
        return folder
    say(f"putting the bundled model together in {folder}")
    try:
        return _put_together(folder)
    except OutputError:
        if cache is not None:
            raise
        folder = Path(tempfile.mkdtemp(prefix="excise-demo-")) / name
        say(f"the cache can't be written: in {folder} instead")
        return _put_together(folder)


def _put_together(folder: Path) -> Path:
    if folder.exists():
        # Damaged: set aside in one step, so that whoever reads it now reads on.
        aside = Path(tempfile.mkdtemp(prefix=".damaged-", dir=folder.parent))
        os.replace(folder, aside / folder.name)
        shutil.rmtree(aside, ignore_errors=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder.parent} can't be made: {error.strerror}") from error
    try:
        with new_folder(folder) as partial:
            shutil.copytree(GRAPHS, partial, dirs_exist_ok=True)
            for component, stored in STORED.items():
                shutil.copyfile(MODEL / stored, partial / component / WEIGHTS)
    except OutputError:
        if folder.is_dir() and not verify(folder):
            return folder  # another process was faster
        raise
    return folder


def _cache() -> Path:
    """``excise/demo`` in the user's cache folder."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no home
        base = Path(tempfile.gettempdir())
    return base / "excise" / "demo"
