"""A gRPC client of Triton, run by the interpreter of its environment, since tritonclient's gRPC pins another protobuf.

    python triton_grpc.py HOST:PORT (infer|stream|cancel) MODEL OUT.npz NAME=JSON …

``infer`` and ``stream`` save the tensors of every response in order, as ``0.IMAGES``, ``0.STEP``, …; ``cancel`` leaves
after the first.
"""

from __future__ import annotations

import json
import queue
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton

TYPES = {
    "PROMPT": ("BYTES", object),
    "SEED": ("INT64", np.int64),
    "NUM_INFERENCE_STEPS": ("INT32", np.int32),
    "GUIDANCE_SCALE": ("FP32", np.float32),
}


def main(url: str, mode: str, model: str, out: str, *tensors: str) -> None:
    """Ask once, and save what comes."""
    inputs = []
    for tensor in tensors:
        name, _, text = tensor.partition("=")
        datatype, dtype = TYPES[name]
        values = [one.encode() if isinstance(one, str) else one for one in json.loads(text)]
        inputs.append(triton.InferInput(name, [len(values), 1], datatype))
        inputs[-1].set_data_from_numpy(np.array(values, dtype).reshape(-1, 1))
    with triton.InferenceServerClient(url) as client:
        responses = (
            [client.infer(model, inputs)] if mode == "infer" else stream(client, model, inputs, mode == "cancel")
        )
    names = [[one.name for one in response.get_response().outputs] for response in responses]
    np.savez(
        out,
        **{
            f"{place}.{name}": response.as_numpy(name)
            for place, response in enumerate(responses)
            for name in names[place]
        },
    )


def stream(client: Any, model: str, inputs: list[Any], leave: bool) -> list[Any]:
    """Responses until the final one, or the first only."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    client.async_stream_infer(model, inputs)
    responses = []
    while True:
        result, error = answers.get(timeout=60)
        if error is not None:
            raise error
        responses.append(result)
        if leave:
            client.stop_stream(cancel_requests=True)
            return responses
        if result.get_response().parameters["triton_final_response"].bool_param:
            client.stop_stream()
            return responses


if __name__ == "__main__":
    main(*sys.argv[1:])
