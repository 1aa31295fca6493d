"""Configurations against Triton's own schema, and the text format against protobuf's own parser."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from excise.enginefile import TensorEntry
from excise.errors import ArtefactError
from excise.serve.onnx_signature import Signature
from excise.serve.pbtxt import Message, Word, parse, write
from excise.serve.triton_config import (
    Accelerator,
    DynamicBatching,
    ExecutionAccelerators,
    Input,
    InstanceGroup,
    Latest,
    ModelConfig,
    ModelWarmup,
    Optimization,
    Output,
    Parameter,
    QueuePolicy,
    RateLimiter,
    Reshape,
    Resource,
    ResponseCache,
    Specific,
    TransactionPolicy,
    VersionPolicy,
    WarmupInput,
)
from excise.serve.triton_models import network_config, pipeline_config
from excise.serve.triton_options import TritonOptions
from excise.serve.triton_schema import schema, schema_problem

EVERYTHING = ModelConfig(
    name="excise",
    platform="onnxruntime_onnx",
    backend="python",
    version_policy=VersionPolicy(specific=Specific(versions=(2, 5))),
    max_batch_size=8,
    input=(
        Input(name="PROMPT", data_type="TYPE_STRING", dims=(1,)),
        Input(name="EDIT", data_type="TYPE_STRING", dims=(-1, 4), optional=True),
        Input(name="timestep", data_type="TYPE_FP16", dims=(1,), reshape=Reshape()),
    ),
    output=(Output(name="IMAGES", data_type="TYPE_UINT8", dims=(64, 64, 3), reshape=Reshape(shape=(64, 192))),),
    optimization=Optimization(
        execution_accelerators=ExecutionAccelerators(
            gpu_execution_accelerator=(Accelerator(name="tensorrt", parameters={"precision_mode": "FP16"}),)
        )
    ),
    dynamic_batching=DynamicBatching(
        preferred_batch_size=(4, 8),
        max_queue_delay_microseconds=500,
        preserve_ordering=True,
        default_queue_policy=QueuePolicy(
            timeout_action="DELAY",
            default_timeout_microseconds=9_000_000_000,
            allow_timeout_override=True,
            max_queue_size=64,
        ),
    ),
    instance_group=(
        InstanceGroup(
            count=2,
            kind="KIND_GPU",
            gpus=(0, 3),
            rate_limiter=RateLimiter(resources=(Resource(name="memory", global_=True, count=4),), priority=2),
        ),
        InstanceGroup(count=1, kind="KIND_CPU"),
    ),
    default_model_filename="model.onnx",
    parameters={"excise.edit_id": Parameter(string_value='a "quoted" \\ line\nand ünïcode →\x01')},
    model_warmup=(
        ModelWarmup(
            name="one",
            batch_size=1,
            inputs={
                "PROMPT": WarmupInput(data_type="TYPE_STRING", dims=(1,), zero_data=True),
                "STEPS": WarmupInput(data_type="TYPE_INT32", dims=(1,), input_data_file="steps"),
            },
        ),
    ),
    model_transaction_policy=TransactionPolicy(decoupled=True),
    response_cache=ResponseCache(enable=False),
)


@pytest.fixture(scope="module")
def parsed() -> Any:
    """Reads a configuration by Triton's own schema."""
    pytest.importorskip("tritonclient")
    text_format = pytest.importorskip("google.protobuf.text_format")

    def read(text: str) -> Any:
        return text_format.Parse(text, schema()())

    return read


def test_every_field_arrives_in_tritons_schema(parsed: Any) -> None:
    found = parsed(EVERYTHING.to_text())
    assert (found.name, found.platform, found.backend, found.max_batch_size) == (
        "excise",
        "onnxruntime_onnx",
        "python",
        8,
    )
    assert found.default_model_filename == "model.onnx"
    assert list(found.version_policy.specific.versions) == [2, 5]
    types = found.input[0].DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
    assert [(one.name, types[one.data_type].name, list(one.dims), one.optional) for one in found.input] == [
        ("PROMPT", "TYPE_STRING", [1], False),
        ("EDIT", "TYPE_STRING", [-1, 4], True),
        ("timestep", "TYPE_FP16", [1], False),
    ]
    assert [one.HasField("reshape") for one in found.input] == [False, False, True]
    assert list(found.input[2].reshape.shape) == []
    assert [(one.name, list(one.dims), list(one.reshape.shape)) for one in found.output] == [
        ("IMAGES", [64, 64, 3], [64, 192])
    ]
    batching = found.dynamic_batching
    assert list(batching.preferred_batch_size) == [4, 8]
    assert (batching.max_queue_delay_microseconds, batching.preserve_ordering) == (500, True)
    queue = batching.default_queue_policy
    actions = queue.DESCRIPTOR.fields_by_name["timeout_action"].enum_type.values_by_number
    assert actions[queue.timeout_action].name == "DELAY"
    assert queue.default_timeout_microseconds == 9_000_000_000
    assert (queue.allow_timeout_override, queue.max_queue_size) == (True, 64)
    kinds = found.instance_group[0].DESCRIPTOR.fields_by_name["kind"].enum_type.values_by_number
    assert [(kinds[one.kind].name, one.count, list(one.gpus)) for one in found.instance_group] == [
        ("KIND_GPU", 2, [0, 3]),
        ("KIND_CPU", 1, []),
    ]
    (resource,) = found.instance_group[0].rate_limiter.resources
    assert (resource.name, getattr(resource, "global"), resource.count) == ("memory", True, 4)
    assert found.instance_group[0].rate_limiter.priority == 2
    (accelerator,) = found.optimization.execution_accelerators.gpu_execution_accelerator
    assert (accelerator.name, dict(accelerator.parameters)) == ("tensorrt", {"precision_mode": "FP16"})
    assert found.parameters["excise.edit_id"].string_value == 'a "quoted" \\ line\nand ünïcode →\x01'
    (sample,) = found.model_warmup
    assert (sample.name, sample.batch_size, sample.inputs["PROMPT"].zero_data) == ("one", 1, True)
    assert sample.inputs["STEPS"].input_data_file == "steps"
    assert found.model_transaction_policy.decoupled
    assert found.HasField("response_cache")
    assert not found.response_cache.enable


def test_every_part_of_the_configuration_is_compared_above() -> None:
    """A field that is added must get a value in ``EVERYTHING``."""
    assert set(ModelConfig.model_fields) == {name for name, _ in EVERYTHING.message().fields}


def test_the_other_version_policy(parsed: Any) -> None:
    policy = VersionPolicy(latest=Latest(num_versions=2))
    config = ModelConfig(name="a", max_batch_size=0, input=(), output=(), version_policy=policy)
    assert parsed(config.to_text()).version_policy.latest.num_versions == 2


def test_reading_what_was_written_gives_the_same_message() -> None:
    message = EVERYTHING.message()
    assert parse(write(message), "config.pbtxt") == message


@given(st.text(), st.integers(-(2**63), 2**63 - 1), st.booleans())
def test_any_value_survives(text: str, number: int, flag: bool) -> None:
    if any("\ud800" <= one <= "\udfff" for one in text):
        return
    message = Message(
        (("a", text), ("n", number), ("b", flag), ("w", Word("KIND_CPU")), ("m", Message((("a", text), ("a", "")))))
    )
    assert parse(write(message), "text") == message


def test_our_reader_agrees_with_protobufs_on_a_configuration_by_hand(parsed: Any) -> None:
    text = r"""
    # a comment # with { marks "
    name: 'ex' "cise"; backend: "python",
    max_batch_size: 0x10
    input [ { name: "A" data_type: TYPE_FP32 dims: [ 1, -1 ] }, { name: "B\x41\102\t" data_type: TYPE_INT64 dims: 3 } ]
    instance_group: < count: 1 kind: KIND_CPU >
    version_policy: { specific { versions: 1 versions: 3 } }
    parameters { key: "k" value: { string_value: "v" } }
    """
    ours = parse(text, "config.pbtxt")
    assert parsed(write(ours)) == parsed(text)
    assert ours.text("name") == "excise"
    assert ours.all("max_batch_size") == (16,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name:", "line 1: the end in place of a value"),
        ('a: "b"\ninput {', "line 2: the text ends before a '}'"),
        ("a 3", "'3' after a, in place of ':'"),
        ("a: [1 2]", "'2' in a list"),
        ("}", "'}' in place of a field's name"),
        ('a: "open', "no name, value or mark"),
        ("a{" * 100, "more than 64 messages"),
        ("a: 1 \x00", "no name, value or mark"),
        ("# #" * 5000 + "\n" + " " * 5000 + "\x00", "no name, value or mark"),
    ],
)
def test_text_that_is_none_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ArtefactError, match=r"config\.pbtxt, line") as caught:
        parse(text, "config.pbtxt")
    assert message in str(caught.value)


def test_replacing_keeps_the_place_and_everything_else() -> None:
    message = parse('a: 1 b: 2 a: 3 c { d: "e" }', "text")
    assert write(message.replaced("a", [4, 5])) == 'a: [4, 5]\nb: 2\nc {\n  d: "e"\n}\n'
    assert write(message.replaced("f", [True])).endswith("f: true\n")
    assert write(message.replaced("b", [])) == 'a: [1, 3]\nc {\n  d: "e"\n}\n'


def test_the_schema_refuses_a_wrong_field() -> None:
    if schema() is None:
        pytest.skip("tritonclient isn't installed")
    text = EVERYTHING.to_text()
    assert schema_problem(text) is None
    assert "preferred_size" in str(schema_problem(text.replace("preferred_batch_size", "preferred_size")))
    assert "KIND_TPU" in str(schema_problem(text.replace("KIND_CPU", "KIND_TPU")))


# --- what a repository is made of ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        TritonOptions(),
        TritonOptions(stream_every=5, threads=2, max_batch_size=1),
        TritonOptions(gpus=(0, 1), provider="cuda", instances=2, resources={"memory": 3}, preferred_batch_sizes=(2, 4)),
        TritonOptions(backend="onnxruntime", queue_timeout_seconds=1.5, max_queue_size=7, name="pictures"),
    ],
)
def test_the_pipelines_configuration(parsed: Any, options: TritonOptions) -> None:
    found = parsed(pipeline_config(options, (64, 48, 3), warmup=True).to_text())
    assert (found.name, found.backend, found.max_batch_size) == (options.name, "python", options.max_batch_size)
    names = [one.name for one in found.input]
    assert names == ["PROMPT", "NEGATIVE_PROMPT", "SEED", "NUM_INFERENCE_STEPS", "GUIDANCE_SCALE", "EDIT"]
    assert [one.optional for one in found.input] == [False, *[True] * 5]
    types = found.input[0].DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
    kinds = [types[one.data_type].name.removeprefix("TYPE_") for one in found.input]
    assert kinds == ["STRING", "STRING", "INT64", "INT32", "FP32", "STRING"]
    assert list(found.output[0].dims) == [64, 48, 3]
    assert [one.name for one in found.output] == ["IMAGES", *(["STEP"] if options.stream_every else [])]
    assert found.model_transaction_policy.decoupled is (options.stream_every > 0)
    assert found.parameters["excise.backend"].string_value == ("python" if options.backend == "python" else "bls")
    assert len(found.model_warmup) == (0 if options.stream_every else 1)
    assert not found.response_cache.enable
    queue = found.dynamic_batching.default_queue_policy
    assert queue.max_queue_size == options.max_queue_size
    assert queue.default_timeout_microseconds == options.queue_timeout_seconds * 1e6
    assert (found.instance_group[0].count, tuple(found.instance_group[0].gpus)) == (options.instances, options.gpus)
    assert len(found.instance_group[0].rate_limiter.resources) == len(options.resources)


def test_a_networks_configuration_has_every_dimension(parsed: Any) -> None:
    signature = Signature(
        {
            "sample": TensorEntry(dtype="float16", shape=(-1, 4, 8, 8)),
            "timestep": TensorEntry(dtype="float32", shape=(1,)),
        },
        {"out_sample": TensorEntry(dtype="float16", shape=(-1, 4, 8, 8))},
    )
    options = TritonOptions(backend="tensorrt", gpus=(1,), network_instances=2)
    found = parsed(network_config("unet", options, signature).to_text())
    assert (found.platform, found.default_model_filename, found.max_batch_size) == ("tensorrt_plan", "model.plan", 0)
    assert [list(one.dims) for one in found.input] == [[-1, 4, 8, 8], [1]]
    assert [one.HasField("reshape") for one in found.input] == [False, False]
    assert (found.instance_group[0].count, list(found.instance_group[0].gpus)) == (2, [1])


@pytest.mark.parametrize("entry", [{"dtype": "float32", "shape": ()}, {"dtype": "complex64", "shape": (1,)}])
def test_a_tensor_that_triton_hasnt_is_refused(entry: dict[str, Any]) -> None:
    signature = Signature({"timestep": TensorEntry(**entry)}, {})
    with pytest.raises(ArtefactError, match="timestep is a "):
        network_config("unet", TritonOptions(backend="onnxruntime"), signature)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "unet"}, "is a network's"),
        ({"name": "../x"}, "pattern"),
        ({"preferred_batch_sizes": (9,)}, "beyond max_batch_size=8"),
        ({"backend": "onnxruntime", "provider": "cuda", "gpus": (0,)}, "is for backend python"),
        ({"backend": "tensorrt"}, "needs a GPU"),
        ({"provider": "cuda"}, "give GPUs"),
        ({"gpus": (0,)}, "none for cpu"),
        ({"queue_timeout_seconds": float("nan")}, "finite"),
        ({"max_batch_size": 0}, "greater than or equal to 1"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TritonOptions.model_validate(options)
