"""The pipeline as a model of Triton's Python backend.

A version of the model is a folder that ``excise.serve.version_folder`` describes. At load its files are compared with
its manifest, its edit with the configuration, and its canary is run; if anything is wrong, loading fails with the
reason and the version isn't ready.

The configuration's parameters are in ``excise.serve.triton_settings``, the tensors in ``excise.serve.triton_request``.

With ``excise.backend`` = ``bls`` the networks are other models, and Triton lets a model call others only while it
executes: the canary then runs before the first request, which is that of ``model_warmup``. Whatever it finds, that
request gets an image: Triton 2.51 was seen to crash (signal 11) where a warm-up request is answered with an error.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np

from excise.errors import ArtefactError, ExciseError, NotServed
from excise.manifest import NAME, hash_file, verify
from excise.serve.canary import CanaryResult, Detector, Images, run
from excise.serve.canary_record import read_canary
from excise.serve.canary_watch import CanaryWatch
from excise.serve.edit_policy import EditPolicy, load_policy
from excise.serve.onnx_component import Provider
from excise.serve.onnx_runtime import OnnxRuntime
from excise.serve.triton_batch import Batch, Member
from excise.serve.triton_bls import TritonRuntime
from excise.serve.triton_metrics import Metrics
from excise.serve.triton_reply import Reply
from excise.serve.triton_request import read_request
from excise.serve.triton_settings import Settings
from excise.serve.version_folder import ONNX, POLICY


class TritonPythonModel:
    """What Triton's Python backend looks for in ``model.py``; the names and signatures are its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open, check and prove this version. Raises ``TritonModelException`` where it mustn't be served."""
        import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # only inside Triton

        self._pb_utils: Any = pb_utils
        self._executed = False
        self._watch: CanaryWatch | None = None
        self._metrics: Metrics | None = None
        try:
            self._open(args)
        except ExciseError as error:
            self._close()
            raise pb_utils.TritonModelException(f"excise: {error}") from error

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        """Answer the requests, those with the same number of steps in one batch; each has its own errors."""
        replies = [Reply(request, self._pb_utils, decoupled=self._decoupled) for request in requests]
        members = []
        refusal, first, self._executed = self._refusal(), not self._executed, True
        for request, reply in zip(requests, replies, strict=True):
            try:
                if refusal is not None and first and self._warms_up(request):
                    reply.images(np.zeros((1, *self._runtime.image_shape), np.uint8), 0)
                    continue
                if refusal is not None:
                    raise refusal
                members.append(
                    Member(read_request(request, self._pb_utils, self._settings, self._runtime, self._policy), reply)
                )
            except Exception as error:
                reply.fail(error)
                self._note(error)
        members.sort(key=lambda member: member.asked.num_inference_steps)
        for _, together in groupby(members, key=lambda member: member.asked.num_inference_steps):
            self._run(list(together))
        for member in members:
            if member.reply.outcome == "images":
                self._count("excise_images_total", len(member.asked.requests))
            elif self._metrics is not None:
                self._metrics.images_failed(member.reply.outcome, len(member.asked.requests))
        for outcome in ("failed", "cancelled"):
            self._count(f"excise_{outcome}_total", sum(reply.outcome == outcome for reply in replies))
        return None if self._decoupled else [reply.response for reply in replies]

    def finalize(self) -> None:
        """Stop the canary; Triton unloads the version."""
        self._close()

    def _open(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        version = Path(args["model_repository"]) / args["model_version"]
        folder = version / ONNX
        self._settings = settings = Settings.read(config, args["model_version"])
        self._log = f"{args['model_name']} version {args['model_version']}"
        for name in settings.unknown:
            self._pb_utils.Logger.log_warn(f"{self._log}: nothing reads the parameter excise.{name}: is it misspelt?")
        self._decoupled = bool((config.get("model_transaction_policy") or {}).get("decoupled"))
        if settings.stream_every and not self._decoupled:
            raise ArtefactError("excise.stream_every needs model_transaction_policy { decoupled: true }")
        # Python itself writes __pycache__ beside model.py
        if problems := [line for line in verify(version) if not line.startswith("__pycache__/")]:
            raise ArtefactError(f"{version} isn't as its manifest says: {'; '.join(problems[:3])}; build it again")
        manifest = hash_file(version / NAME)
        if settings.manifest_sha256 not in (None, manifest):
            raise ArtefactError(
                f"{version / NAME} has SHA-256 {manifest[:12]}…, and the configuration says "
                f"{str(settings.manifest_sha256)[:12]}…: build the repository again"
            )
        self._policy: EditPolicy | None = load_policy(version / POLICY) if (version / POLICY).is_file() else None
        self._runtime = self._opened(folder, args, int(config.get("max_batch_size") or 1))
        if self._runtime.edit_id != settings.edit_id:
            raise ArtefactError(
                f"{folder} carries {_edit(self._runtime.edit_id)}, and the configuration says "
                f"{_edit(settings.edit_id)}: build or promote again"
            )
        held = self._runtime.bank or (self._runtime.edit_id,)
        if strange := [name for name, edit in settings.edits.items() if edit not in held]:
            raise ArtefactError(f"excise.edits names {strange[0]!r}, which {folder} doesn't hold: build it again")
        self._metrics = Metrics(
            self._pb_utils,
            {"model": args["model_name"], "version": args["model_version"], "instance": args["model_instance_name"]},
            {"edit_id": self._runtime.edit_id or "", "manifest_sha256": manifest},
        )
        if settings.canary == "required":
            self._prove(version, hash_file(folder / NAME))

    def _opened(self, folder: Path, args: dict[str, str], max_batch_size: int) -> OnnxRuntime:
        settings = self._settings
        if settings.backend == "bls":
            return TritonRuntime(
                folder,
                self._pb_utils,
                int(args["model_version"]),
                networks=settings.networks,
                batch_size=max_batch_size,
            )
        return OnnxRuntime(
            folder,
            name="triton",
            provider=cast(Provider, settings.provider),
            threads=settings.threads,
            batch_size=max_batch_size,
            device=int(args.get("model_instance_device_id") or 0),
        )

    def _prove(self, version: Path, export: str) -> None:
        """Run the canary, or of BLS have it run before the first request, and from then on by the timer.

        ``export`` is the SHA-256 of the export's manifest.
        """
        canary = read_canary(version)
        if canary.manifest_sha256 not in (None, export):
            raise ArtefactError(f"{version}'s canary was recorded of another export: build or promote again")
        detector = _nudenet() if self._settings.canary_detector == "nudenet" else None
        self._watch = CanaryWatch(
            lambda: run(self._runtime, canary, detector=detector),
            self._settings.canary_interval,
            on_result=self._noted,
        )
        if self._settings.backend == "bls":
            return
        result = self._watch.check()
        if not result.passed:
            raise ArtefactError(f"the canary of {version} failed: {result.reason}")
        self._watch.start()

    def _noted(self, result: CanaryResult) -> None:
        if self._metrics is not None:
            self._metrics.canary(result)
        if not result.passed:
            self._pb_utils.Logger.log_error(f"{self._log}: the canary failed: {result.reason}")

    def _refusal(self) -> NotServed | None:
        """Why nothing is answered, None where all is well. Of BLS a canary that is due runs here."""
        if self._watch is None:
            return None
        if self._settings.backend == "bls" and self._watch.due:
            self._watch.check()
        result = self._watch.result
        if result is None or result.passed or self._settings.canary_on_failure == "report":
            return None
        return NotServed("the canary failed, this model isn't what was signed off: see the server's log, and roll back")

    def _warms_up(self, request: Any) -> bool:
        """Whether this may be the warm-up request of ``triton_models``: one empty prompt."""
        prompt = self._pb_utils.get_input_tensor_by_name(request, "PROMPT")
        return prompt is not None and prompt.as_numpy().ravel().tolist() == [b""]

    def _run(self, members: list[Member]) -> None:
        def count(images: int) -> None:
            self._count("excise_unet_steps_total")
            self._count("excise_image_steps_total", images)

        batch = Batch(
            self._runtime,
            members,
            preview_every=self._settings.stream_every,
            preview=self._settings.stream_output,
            on_step=count,
        )
        try:
            batch.run()
        except Exception as error:
            self._note(error)

    def _count(self, name: str, amount: float = 1) -> None:
        if self._metrics is not None:
            self._metrics.add(name, amount)

    def _note(self, error: Exception) -> None:
        """What isn't excise's belongs into the log: the client is told no more than its class."""
        if not isinstance(error, ExciseError):
            self._pb_utils.Logger.log_error(f"{self._log}: {error!r}")

    def _close(self) -> None:
        if self._watch is not None:
            self._watch.stop()
        if self._metrics is not None:
            self._metrics.close()


def _edit(edit_id: str | None) -> str:
    return f"edit {edit_id[:12]}…" if edit_id is not None else "no one edit"


def _nudenet() -> Detector:
    """Which images show nudity. Raises ``MissingExtra`` without nudenet."""
    from excise.serve.output_filter import NudeNetFilter

    found = NudeNetFilter()

    def detect(images: Images) -> list[bool]:
        return [verdict.flagged for verdict in found.verdicts(list(images))]

    return detect
