"""The options by which a command finds its server, and the client made from them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer
from aiorch_client import Client, ClientError, RequestError, TlsConfig, UnreachableError

from aiorch_server.cli.output import CommandError, ExitCode, Output, UsageError
from aiorch_server.config.load import HEADERS_VARIABLE, TOKEN_VARIABLE, read_headers_variable, read_token_variable

DEFAULT_URL = "127.0.0.1:8001"
CONNECT_S = 5.0
#: What gRPC takes as the name of a text.
_HEADER_NAME = re.compile(r"(?!grpc-)(?!.*-bin$)[a-z0-9_.-]+")
#: What another command needs to find the same server.
_WAY = {
    "url": "--url",
    "tls": "--tls",
    "tls_root_cert": "--tls-root-cert",
    "tls_cert": "--tls-cert",
    "tls_key": "--tls-key",
    "token_file": "--token-file",
}

URL_HELP = "Where the server's gRPC listens: host:port."
Url = Annotated[str, typer.Option("--url", "-u", help=URL_HELP)]
TimeoutSecs = Annotated[float, typer.Option("--timeout-secs", min=0.001, max=86_400, help="Longest time of one call.")]
UseTls = Annotated[bool, typer.Option("--tls", help="Connect with TLS; implied by the other TLS options.")]
TlsRoot = Annotated[Path | None, typer.Option("--tls-root-cert", help="PEM of authorities to trust, not the system's.")]
TlsCert = Annotated[Path | None, typer.Option("--tls-cert", help="PEM of the client's own certificate.")]
TlsKey = Annotated[Path | None, typer.Option("--tls-key", help="PEM of the client's own key.")]
TokenFile = Annotated[
    Path | None,
    typer.Option("--token-file", help="File with a token or API key for every call; else AIORCH_TOKEN is one."),
]

HeaderOption = Annotated[
    list[str] | None,
    typer.Option(
        "--header",
        metavar="NAME=VALUE",
        help="Sent with every call, NAME=@FILE from a file; repeatable. Also AIORCH_HEADERS, one a line.",
    ),
]


class ClientOutput(Output):
    """The output of a command that calls a server; ``way``: the options of ``admin_command`` by which it found it."""

    def __init__(self, is_json: bool, way: Mapping[str, Any] = MappingProxyType({})) -> None:
        super().__init__(is_json)
        self._way = way

    def write_command(self, *words: str) -> str:
        """A command for the same server, to be pasted into a shell."""
        way: list[str] = []
        for name, value in self._way.items():
            if name in _WAY and value is True:
                way.append(_WAY[name])
            elif name in _WAY and value and (name, value) != ("url", DEFAULT_URL):
                way += (_WAY[name], str(value))
        return shlex.join(("aiorch", *words, *way))

    @contextmanager
    def guard(self) -> Iterator[None]:
        """As ``Output.guard``, for what a client raises too."""
        with super().guard():
            try:
                yield
            except ClientError as error:
                is_unreachable = isinstance(error, UnreachableError)
                exit_code = ExitCode.UNREACHABLE if is_unreachable else ExitCode.REFUSED
                raise CommandError(error.details, exit_code, error.code.name, error.reason) from None


def make_tls(use_tls: bool, root: Path | None, certificate: Path | None, key: Path | None) -> TlsConfig | None:
    """The TLS settings; None for a plain connection."""
    if not use_tls and root is None and certificate is None and key is None:
        return None
    try:
        return TlsConfig(root=root, certificate=certificate, key=key)
    except RequestError as error:
        raise UsageError(error.details) from error


def read_token(path: Path | None) -> str | None:
    """The token in a file, else in the environment: these do not show in the list of processes, command lines do."""
    if path is None:
        token, where = read_token_variable(), f"the environment variable {TOKEN_VARIABLE}"
        if not token:
            return None
    else:
        try:
            token, where = path.read_text().strip(), f"--token-file {path}"
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--token-file {path} cannot be read: {error}") from error
    if not token or not token.isascii() or not token.isprintable():
        raise UsageError(f"{where} holds no token: expected one line of printable ASCII")
    return token


def read_headers(given: Sequence[str] | None) -> tuple[tuple[str, str], ...]:
    """Names and values of what is sent with every call: of the environment, and of ``--header`` where both say one."""
    found: dict[str, str] = {}
    lines = [line for line in read_headers_variable().splitlines() if line.strip()]
    for where, texts in ((f"the environment variable {HEADERS_VARIABLE}", lines), ("--header", given or ())):
        for text in texts:
            name, separator, value = text.partition("=")
            name = name.strip().lower()
            if not separator or _HEADER_NAME.fullmatch(name) is None or name == "authorization":
                # not repeated: it may be a secret
                raise UsageError(f"{where}: expected NAME=VALUE or NAME=@FILE; tokens are for --token-file")
            found[name] = _read_header(where, name, value.strip())
    return tuple(found.items())


def _read_header(where: str, name: str, value: str) -> str:
    if value.startswith("@"):
        try:
            value = Path(value[1:]).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{where} {name}: the file {value[1:]} cannot be read: {error}") from error
    if not value.isascii() or not value.isprintable():
        raise UsageError(f"{where} {name}: expected one line of printable ASCII")
    return value


@contextmanager
def open_client(
    url: str,
    *,
    timeout_s: float,
    tls: TlsConfig | None,
    token: str | None,
    metadata: Sequence[tuple[str, str | bytes]] = (),
) -> Iterator[Client]:
    """A connected client; UnreachableError where nobody answers."""
    try:
        made = Client(url, tls=tls, token=token, metadata=metadata, timeout_s=timeout_s)
    except RequestError as error:  # nothing was sent yet: the address or the files are wrong
        raise UsageError(error.details) from error
    with made as client:
        client.connect(min(timeout_s, CONNECT_S))
        yield client
