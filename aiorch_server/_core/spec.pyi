from aiorch_server.types import ModelSignature

class ModelSpec:
    name: str
    version: int
    signature: ModelSignature
    def __init__(self, name: str, version: int, signature: ModelSignature) -> None: ...
