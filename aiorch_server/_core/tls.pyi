from typing import Any

class TlsContext:
    """What a secure port of an ``IoThread`` shows and asks for; all PEM."""

    def __init__(
        self,
        private_key: bytes,
        certificate_chain: bytes,
        root_certificates: bytes | None = None,
        require_client_auth: bool = False,
    ) -> None: ...
    @property
    def capsule(self) -> Any: ...
    def renew(self, other: TlsContext) -> None: ...

def read_names(certificate: bytes) -> tuple[bytes | None, list[tuple[str, bytes]]]: ...
