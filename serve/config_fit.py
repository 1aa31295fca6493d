"""Whether Triton's configurations fit the files that they are of."""

from __future__ import annotations

from excise.serve.onnx_signature import Signature
from excise.serve.pbtxt import Message
from excise.serve.triton_models import tensors

#: Of the pipeline's inputs, those that every configuration has; the others have defaults and may be taken out.
PIPELINE_INPUTS = frozenset({"PROMPT", "NEGATIVE_PROMPT", "SEED", "NUM_INFERENCE_STEPS", "GUIDANCE_SCALE", "EDIT"})


def network_fit(config: Message, signature: Signature, source: str) -> list[str]:
    """One line for each input and output of a network that its configuration doesn't describe as the file does."""
    problems = []
    inputs, outputs = tensors(signature)
    for field, expected in (("input", inputs), ("output", outputs)):
        found = {one.text("name"): _described(one) for one in config.messages(field)}
        messages = [one.message() for one in expected]
        wanted = {one.text("name"): _described(one) for one in messages}
        for name in sorted({*found, *wanted}, key=str):
            if found.get(name) != wanted.get(name):
                said, is_ = found.get(name, "none"), wanted.get(name, "none")
                problems.append(f"{source}: {field} {name} is {said}, and the network's is {is_}")
    return problems


def pipeline_fit(config: Message, image_shape: tuple[int, int, int], source: str) -> list[str]:
    """One line for each thing that makes a pipeline's configuration unfit for what the pipeline takes and gives."""
    problems = [] if config.text("backend") == "python" else [f"{source}: backend isn't python"]
    inputs = {str(one.text("name")) for one in config.messages("input")}
    problems += [f"{source}: there is no input {name} in the pipeline" for name in sorted(inputs - PIPELINE_INPUTS)]
    problems += [] if "PROMPT" in inputs else [f"{source}: input PROMPT is missing"]
    images = [one for one in config.messages("output") if one.text("name") == "IMAGES"]
    found = images[0].all("dims") if images else ()
    if found != image_shape:
        problems.append(f"{source}: output IMAGES is {list(found)}, and the pipeline's images are {list(image_shape)}")
    return problems


def _described(tensor: Message) -> str:
    scalar = any(not one.all("shape") for one in tensor.messages("reshape"))
    return f"{tensor.text('data_type')} {'scalar' if scalar else list(tensor.all('dims'))}"
