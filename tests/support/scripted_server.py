"""A real gRPC server of the V2 protocol that does what a test says."""

import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
from aiorch_proto.v2 import inference_pb2 as pb
from aiorch_proto.v2.service import METHODS, SERVICE_NAME

TENSOR = pb.ModelMetadataResponse.TensorMetadata
SPECS = {
    "fp32": ("FP32", [-1, 4]),
    "fp16": ("FP16", [-1]),
    "bf16": ("BF16", [-1]),
    "text": ("BYTES", [-1]),
}


class Peer:
    """A V2 server whose models give back their input; tests set ``on_infer`` to make it do something else."""

    def __init__(self, credentials=None):
        self.calls = []
        self.ended = threading.Event()
        self.on_infer = lambda request, context: None
        self.server = grpc.server(ThreadPoolExecutor(16))
        handlers = {
            name: (
                grpc.stream_stream_rpc_method_handler if method.is_streaming else grpc.unary_unary_rpc_method_handler
            )(
                self._noted(name),
                request_deserializer=method.request.FromString,
                response_serializer=method.response.SerializeToString,
            )
            for name, method in METHODS.items()
            if hasattr(self, name)
        }
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
        if credentials is None:
            self.port = self.server.add_insecure_port("127.0.0.1:0")
        else:
            self.port = self.server.add_secure_port("127.0.0.1:0", credentials)
        self.target = f"127.0.0.1:{self.port}"
        self.server.start()

    def _noted(self, name):
        method = getattr(self, name)

        def call(request, context):
            self.calls.append((name, dict(context.invocation_metadata())))
            return method(request, context)

        return call

    def count(self, name):
        return sum(called == name for called, _ in self.calls)

    def ServerLive(self, request, context):
        return pb.ServerLiveResponse(live=True)

    def ServerReady(self, request, context):
        return pb.ServerReadyResponse(ready=False)

    def ModelReady(self, request, context):
        return pb.ModelReadyResponse(ready=request.name in SPECS)

    def ServerMetadata(self, request, context):
        return pb.ServerMetadataResponse(name="peer", version="1.2", extensions=["statistics"])

    def ModelMetadata(self, request, context):
        if request.name not in SPECS:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"Request for unknown model: '{request.name}' is not found")
        datatype, shape = SPECS[request.name]
        return pb.ModelMetadataResponse(
            name=request.name,
            versions=["3"],
            inputs=[TENSOR(name="x", datatype=datatype, shape=shape)],
            outputs=[TENSOR(name="y", datatype=datatype, shape=shape)],
        )

    def ModelConfig(self, request, context):
        reply = pb.ModelConfigResponse()
        reply.config.name = request.name
        reply.config.max_batch_size = 8
        return reply

    def ModelStatistics(self, request, context):
        model = pb.ModelStatistics(name="fp32", version="3", inference_count=8, execution_count=2)
        model.inference_stats.queue.count = 4
        model.inference_stats.queue.ns = 8_000_000
        return pb.ModelStatisticsResponse(model_stats=[model])

    def RepositoryIndex(self, request, context):
        entry = pb.RepositoryIndexResponse.ModelIndex(name="fp32", version="3", state="READY", reason="")
        return pb.RepositoryIndexResponse(models=[entry])

    def RepositoryModelLoad(self, request, context):
        self.loaded = request
        return pb.RepositoryModelLoadResponse()

    def RepositoryModelUnload(self, request, context):
        self.unloaded = request
        return pb.RepositoryModelUnloadResponse()

    def ModelInfer(self, request, context):
        context.add_callback(self.ended.set)
        self.on_infer(request, context)
        return echo(request)

    def ModelStreamInfer(self, requests, context):
        context.add_callback(self.ended.set)
        wants_status = ("triton_grpc_error", "true") in context.invocation_metadata()
        for request in requests:
            if request.id == "bad" and wants_status:
                context.abort(grpc.StatusCode.NOT_FOUND, "bad request")
            elif request.id == "bad":
                yield pb.ModelStreamInferResponse(
                    error_message="bad request", infer_response=pb.ModelInferResponse(id=request.id)
                )
            else:
                yield pb.ModelStreamInferResponse(infer_response=echo(request))


def echo(request):
    reply = pb.ModelInferResponse(model_name=request.model_name, model_version="3", id=request.id)
    for tensor in request.inputs:
        reply.outputs.add(name="y", datatype=tensor.datatype, shape=tensor.shape)
    reply.raw_output_contents.extend(request.raw_input_contents)
    return reply
