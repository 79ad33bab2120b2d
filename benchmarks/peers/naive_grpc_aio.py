"""The server that everyone writes first: grpc.aio, generated stubs, numpy, the model called in the method itself.

Serves ModelInfer for ``identity_fp32`` and one ONNX model, unbatched. It is a yardstick, not a part of the product.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import grpc
import numpy as np
import numpy.typing as npt
import onnxruntime
import uvloop
from tritonclient.grpc import service_pb2, service_pb2_grpc

DATATYPES = {"FP32": np.float32, "INT64": np.int64}
NAMES = {np.dtype(dtype): name for name, dtype in DATATYPES.items()}

#: By default gRPC refuses some requests at random when a thousand wait to be taken up.
OPTIONS = (("grpc.server.max_pending_requests", 8192), ("grpc.server.max_pending_requests_hard_limit", 8192))

Arrays = Mapping[str, npt.NDArray[np.generic]]


def load_onnx(path: Path) -> Callable[[Arrays], Arrays]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, dict(inputs)), strict=True))


class InferenceService(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, models: Mapping[str, Callable[[Arrays], Arrays]]) -> None:
        self._models = models

    async def ServerReady(
        self, request: service_pb2.ServerReadyRequest, context: grpc.aio.ServicerContext
    ) -> service_pb2.ServerReadyResponse:
        return service_pb2.ServerReadyResponse(ready=True)

    async def ModelInfer(
        self, request: service_pb2.ModelInferRequest, context: grpc.aio.ServicerContext
    ) -> service_pb2.ModelInferResponse:
        if request.model_name not in self._models:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown model '{request.model_name}'")
        inputs = {
            tensor.name: np.frombuffer(raw, DATATYPES[tensor.datatype]).reshape(tuple(tensor.shape))
            for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        response = service_pb2.ModelInferResponse(model_name=request.model_name, model_version="1", id=request.id)
        for name, array in self._models[request.model_name](inputs).items():
            response.outputs.add(name=name, datatype=NAMES[array.dtype], shape=array.shape)
            response.raw_output_contents.append(array.tobytes())
        return response


async def serve(
    port: int, models: Mapping[str, Callable[[Arrays], Arrays]], credentials: grpc.ServerCredentials | None
) -> None:
    server = grpc.aio.server(options=OPTIONS)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(InferenceService(models), server)
    if credentials is None:
        server.add_insecure_port(f"127.0.0.1:{port}")
    else:
        server.add_secure_port(f"127.0.0.1:{port}", credentials)
    await server.start()
    await server.wait_for_termination()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--onnx", type=Path, help="model.onnx served under --onnx-name beside identity_fp32")
    parser.add_argument("--onnx-name", default="model")
    parser.add_argument("--certificate", type=Path, help="PEM; with it and --key the port speaks TLS")
    parser.add_argument("--key", type=Path)
    arguments = parser.parse_args()
    models: dict[str, Callable[[Arrays], Arrays]] = {"identity_fp32": lambda inputs: {"OUTPUT0": inputs["INPUT0"]}}
    if arguments.onnx:
        models[arguments.onnx_name] = load_onnx(arguments.onnx)
    credentials = None
    if arguments.certificate:
        pair = (arguments.key.read_bytes(), arguments.certificate.read_bytes())
        credentials = grpc.ssl_server_credentials([pair])
    uvloop.run(serve(arguments.port, models, credentials))


if __name__ == "__main__":
    main()
