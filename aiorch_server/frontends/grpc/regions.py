"""The RPCs of the shared memory extensions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiorch_proto.v2 import inference_pb2 as pb

from aiorch_server.exchange import refuse_cuda_region, refuse_cuda_status

if TYPE_CHECKING:
    from aiorch_server.controlplane import ControlPlane


class SharedMemoryRpcs:
    """System shared memory over the control plane's regions; CUDA shared memory, of which there is none."""

    _controlplane: ControlPlane

    async def SystemSharedMemoryStatus(
        self, request: pb.SystemSharedMemoryStatusRequest, context: Any
    ) -> pb.SystemSharedMemoryStatusResponse:
        """All regions for an empty name, else the named one."""
        response = pb.SystemSharedMemoryStatusResponse()
        for region in self._controlplane.regions.list_regions(request.name):
            status = response.regions[region.name]
            status.name, status.key = region.name, region.key
            status.offset, status.byte_size = region.offset, region.byte_size
        return response

    async def SystemSharedMemoryRegister(
        self, request: pb.SystemSharedMemoryRegisterRequest, context: Any
    ) -> pb.SystemSharedMemoryRegisterResponse:
        """Makes part of a shared memory object usable by name."""
        self._controlplane.regions.register(request.name, request.key, request.offset, request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    async def SystemSharedMemoryUnregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, context: Any
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        """Forgets the named region, all for an empty name."""
        self._controlplane.regions.unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    async def CudaSharedMemoryStatus(
        self, request: pb.CudaSharedMemoryStatusRequest, context: Any
    ) -> pb.CudaSharedMemoryStatusResponse:
        """No region for an empty name; others are not found."""
        refuse_cuda_status(request.name)
        return pb.CudaSharedMemoryStatusResponse()

    async def CudaSharedMemoryRegister(
        self, request: pb.CudaSharedMemoryRegisterRequest, context: Any
    ) -> pb.CudaSharedMemoryRegisterResponse:
        """Refused."""
        raise refuse_cuda_region(request.name)

    async def CudaSharedMemoryUnregister(
        self, request: pb.CudaSharedMemoryUnregisterRequest, context: Any
    ) -> pb.CudaSharedMemoryUnregisterResponse:
        """Done: no region of any name is left."""
        return pb.CudaSharedMemoryUnregisterResponse()
