"""``aiorch status``, ``infer`` and ``bench`` against a real gRPC server that this file scripts."""

import io
import json
import socket
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from aiorch_proto.v2 import inference_pb2 as pb
from aiorch_proto.v2.service import METHODS, SERVICE_NAME
from typer.testing import CliRunner

from aiorch_server.cli import build_app

TENSOR = pb.ModelMetadataResponse.TensorMetadata


class Peer:
    """Model ``sum`` adds a batch's FP32 inputs ``a`` and ``b`` [-1, 2]; ``text`` gives back BYTES; ``broken`` fails."""

    def __init__(self):
        self.requests = []
        self.server = grpc.server(ThreadPoolExecutor(8))
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                getattr(self, name),
                request_deserializer=method.request.FromString,
                response_serializer=method.response.SerializeToString,
            )
            for name, method in METHODS.items()
            if hasattr(self, name)
        }
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
        self.url = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def ServerMetadata(self, request, context):
        return pb.ServerMetadataResponse(name="peer", version="1.2")

    def ServerReady(self, request, context):
        return pb.ServerReadyResponse(ready=True)

    def RepositoryIndex(self, request, context):
        entry = pb.RepositoryIndexResponse.ModelIndex
        return pb.RepositoryIndexResponse(
            models=[
                entry(name="sum", version="1", state="READY"),
                entry(name="[red]odd", version="", state="UNAVAILABLE", reason="[bold]no artefact"),
            ]
        )

    def ModelStatistics(self, request, context):
        model = pb.ModelStatistics(name="sum", version="1", inference_count=1200, execution_count=100)
        model.inference_stats.success.count = 600
        model.inference_stats.queue.count = 600
        model.inference_stats.queue.ns = 600 * 1_500_000
        return pb.ModelStatisticsResponse(model_stats=[model])

    def ModelMetadata(self, request, context):
        if request.name == "text":
            inputs = [TENSOR(name="x", datatype="BYTES", shape=[-1])]
        elif request.name in ("sum", "broken"):
            inputs = [TENSOR(name=name, datatype="FP32", shape=[-1, 2]) for name in "ab"]
        else:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"unknown model '{request.name}'")
        outputs = [TENSOR(name="y", datatype=inputs[0].datatype, shape=inputs[0].shape)]
        return pb.ModelMetadataResponse(name=request.name, versions=["1"], inputs=inputs, outputs=outputs)

    def ModelConfig(self, request, context):
        reply = pb.ModelConfigResponse()
        reply.config.max_batch_size = 8
        return reply

    def ModelInfer(self, request, context):
        self.requests.append(request)
        if request.model_name == "broken":
            context.abort(grpc.StatusCode.INTERNAL, "the model failed")
        reply = pb.ModelInferResponse(model_name=request.model_name, model_version="1", id=request.id)
        datatype, shape = request.inputs[0].datatype, request.inputs[0].shape
        reply.outputs.add(name="y", datatype=datatype, shape=shape)
        if datatype == "BYTES":
            reply.raw_output_contents.append(request.raw_input_contents[0])
        else:
            a, b = (np.frombuffer(raw, "<f4") for raw in request.raw_input_contents)
            reply.raw_output_contents.append((a + b).tobytes())
        return reply


@pytest.fixture(scope="module")
def served():
    peer = Peer()
    yield peer
    peer.server.stop(None).wait(10)


@pytest.fixture
def peer(served):
    served.requests.clear()
    return served


@pytest.fixture
def nobody():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def run(*arguments, stdin=None):
    return CliRunner().invoke(build_app(), [str(each) for each in arguments], input=stdin)


def run_json(*arguments, stdin=None):
    result = run(*arguments, "--json", stdin=stdin)
    return result.exit_code, json.loads(result.stdout)


@pytest.mark.parametrize("command", [("status",), ("infer", "sum", "--input", "-"), ("bench", "sum")])
def test_no_server_is_exit_code_3(command, nobody):
    code, document = run_json(*command, "--url", nobody, stdin="{}")
    assert code == 3
    assert document["error"]["code"] == "UNAVAILABLE"
    assert nobody in document["error"]["text"]
    result = run(*command, "--url", nobody, stdin="{}")
    assert result.exit_code == 3
    assert result.stdout == ""
    assert "is it running" in result.stderr
    assert "Traceback" not in result.output


def test_what_the_server_refuses_is_exit_code_1(peer):
    assert run_json("infer", "none", "--input", "-", "--url", peer.url, stdin="[1]")[0] == 1
    values = '{"a": [[1, 2]], "b": [[3, 4]]}'
    code, document = run_json("infer", "broken", "--input", "-", "--url", peer.url, stdin=values)
    assert (code, document) == (1, {"error": {"code": "INTERNAL", "text": "the model failed"}})
    code, document = run_json("bench", "broken", "--url", peer.url)
    assert (code, document["error"]["text"]) == (1, "the model failed")


@pytest.mark.parametrize(
    ("arguments", "stdin", "text"),
    [
        (("--input", "none.npy"), None, "none.npy cannot be read"),
        (("--input", "-"), "{", "standard input cannot be understood"),
        (("--input", "-", "--input", "a=-"), "[1]", "once only"),
        (("--input", "-", "--input", "a=pyproject.toml"), "[1]", "pyproject.toml cannot be understood"),
        (("--input", "-", "--tls-cert", "x"), "[1]", "come together"),
        (("--input", "-", "--tls-root-cert", "none.pem"), "[1]", "none.pem' cannot be read"),
        (("--input", "-", "--parameter", "x"), "[1]", "expected KEY=VALUE"),
        (("--input", "-", "--output", "x.txt"), "[1]", "ends in .npz"),
        (("--input", "-"), '{"inputs": [{"name": "a"}]}', "not a V2 request"),
        (("--input", "-", "--url", "http://127.0.0.1:8000"), "[1]", "no gRPC address"),
    ],
)
def test_what_cannot_be_asked_says_what_would_be_right(peer, arguments, stdin, text):
    code, document = run_json("infer", "sum", "--url", peer.url, *arguments, stdin=stdin)
    assert code == 2
    assert text in document["error"]["text"]
    assert not peer.requests


def test_an_unknown_option_is_exit_code_2():
    assert run("infer", "sum").exit_code == 2
    assert run("bench", "sum", "--concurrency", "0").exit_code == 2
    assert run("bench", "sum", "--concurrency", "3", "--connections", "2").exit_code == 2


def test_infer_from_every_kind_of_file(peer, tmp_path):
    a, b = np.array([[1, 2]], np.float32), np.array([[10, 20]], np.float32)
    np.save(tmp_path / "a.npy", a)
    np.savez(tmp_path / "both.npz", a=a, b=b)
    (tmp_path / "b.json").write_text("[[10, 20]]")
    (tmp_path / "both.json").write_text('{"a": [[1, 2]], "b": [[10, 20]]}')
    v2 = {
        "inputs": [
            {"name": n, "shape": [1, 2], "datatype": "FP32", "data": d} for n, d in (("a", [1, 2]), ("b", [10, 20]))
        ]
    }
    (tmp_path / "v2.json").write_text(json.dumps(v2))
    buffer = io.BytesIO()
    np.save(buffer, b)
    ways = [
        (["-i", f"a={tmp_path / 'a.npy'}", "-i", f"b={tmp_path / 'b.json'}"], None),
        (["-i", tmp_path / "both.npz"], None),
        (["-i", tmp_path / "both.json"], None),
        (["-i", tmp_path / "v2.json"], None),
        (["-i", f"a={tmp_path / 'a.npy'}", "-i", "b=-"], buffer.getvalue()),
    ]
    for arguments, stdin in ways:
        code, document = run_json("infer", "sum", "--url", peer.url, *arguments, stdin=stdin)
        assert code == 0, document
        assert document["outputs"] == [{"name": "y", "dtype": "float32", "shape": [1, 2], "data": [[11.0, 22.0]]}]


def test_infer_writes_npz_and_passes_its_options_on(peer, tmp_path):
    target = tmp_path / "out.npz"
    options = ["--request-id", "r", "--model-version", "1", "--output-name", "y", "--parameter", "priority=2"]
    result = run("infer", "text", "-i", "-", "--url", peer.url, *options, "-o", target, stdin='["ü", "b"]')
    assert result.exit_code == 0, result.output
    with np.load(target) as stored:
        assert stored["y"].tolist() == ["ü".encode(), b"b"]
    (request,) = peer.requests
    assert (request.id, request.model_version) == ("r", "1")
    assert [each.name for each in request.outputs] == ["y"]
    assert request.parameters["priority"].int64_param == 2
    assert (
        run("infer", "text", "-i", "-", "--url", peer.url, "-o", tmp_path / "no" / "x.npz", stdin='["a"]').exit_code
        == 2
    )


def test_json_carries_bytes_and_special_floats(peer):
    _, document = run_json("infer", "text", "-i", "-", "--url", peer.url, stdin='["ü"]')
    assert document["outputs"][0]["data"] == ["ü"]
    _, document = run_json(
        "infer", "sum", "-i", "-", "--url", peer.url, stdin='{"a": [[NaN, 1]], "b": [[1, Infinity]]}'
    )
    assert document["outputs"][0]["data"] == [["NaN", "Infinity"]]


def test_status_shows_models_and_statistics(peer):
    code, document = run_json("status", "--url", peer.url)
    assert code == 0
    assert document["server"] == {"url": peer.url, "is_ready": True, "name": "peer", "version": "1.2", "extensions": []}
    good, odd = document["models"]
    assert (good["statistics"]["mean_batch"], good["statistics"]["mean_queue_ms"]) == (12.0, 1.5)
    assert (odd["statistics"], odd["reason"]) == (None, "[bold]no artefact")
    text = run("status", "--url", peer.url).stdout
    assert "1,200" in text
    assert "[red]odd" in text  # names are text, not markup


@pytest.mark.parametrize(
    "extra", [(), ("--rate", "50", "--arrival", "constant"), ("--data", "zeros", "--connections", "2")]
)
def test_bench_measures(peer, extra):
    options = ["--concurrency", "2", "--duration", "0.5", "--warm-up", "0.1", "--batch", "3"]
    code, document = run_json("bench", "sum", "--url", peer.url, *options, *extra)
    assert code == 0, document
    assert document["req_per_s"] > 0
    assert document["errors"] == {}
    assert document["latency_us"]["p99.9"] > 0
    assert {tuple(request.inputs[0].shape) for request in peer.requests} == {(3, 2)}


def test_bench_takes_inputs_and_shows_a_table(peer):
    options = ["--duration", "0.2", "--warm-up", "0", "-i", "-"]
    result = run("bench", "text", "--url", peer.url, *options, stdin='["abc"]')
    assert result.exit_code == 0, result.output
    assert "p99.9 ms" in result.stdout
    assert all(request.raw_input_contents[0] == b"\3\0\0\0abc" for request in peer.requests)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--shape", "a:0"), "expected NAME:D1,D2"),
        (("--shape", "a:3"), "does not fit"),
        (("--shape", "q:2"), "the inputs are"),
        (("--rate", "10000000", "--duration", "1000"), "more than max_requests"),
    ],
)
def test_bench_refuses_what_cannot_be(peer, options, text):
    code, document = run_json("bench", "sum", "--url", peer.url, *options)
    assert code == 2
    assert text in document["error"]["text"]


def test_a_token_is_read_from_a_file(peer, tmp_path):
    (tmp_path / "token").write_text("two\nlines")
    code, document = run_json("status", "--url", peer.url, "--token-file", tmp_path / "token")
    assert (code, "holds no token" in document["error"]["text"]) == (2, True)
    (tmp_path / "token").write_text("secret\n")
    assert run("status", "--url", peer.url, "--token-file", tmp_path / "token").exit_code == 0


def test_version():
    assert run("version").stdout.startswith("aiorchestrator ")
    assert run("--version").stdout == run("version").stdout
    assert run_json("version")[1]["aiorchestrator"]
