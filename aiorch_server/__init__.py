"""AIOrchestrator: a gRPC model server with a compiled batching core."""

__version__ = "0.1.0"
