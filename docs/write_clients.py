"""Writes the table of docs/clients.md from the ``proves`` marks of the tests; run it after changing them.

``@pytest.mark.proves(*calls, by=clients)`` names calls and clients with literals; both may be patterns
(``SystemSharedMemory*``, ``tritonclient.*``), a call may stand without its service.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_name("clients.md")
BEGIN, END = "<!-- table: docs/write_clients.py -->\n", "<!-- end of the table -->\n"
V2 = "GRPCInferenceService"
MODEL = "/v2/models/M"
REGION = "sharedmemory[/region/R]"
#: Each call as ``service/call``, and its form over REST.
CALLS = {
    f"{V2}/ServerLive": "/v2/health/live",
    f"{V2}/ServerReady": "/v2/health/ready",
    f"{V2}/ModelReady": f"{MODEL}/ready",
    f"{V2}/ServerMetadata": "/v2",
    f"{V2}/ModelMetadata": MODEL,
    f"{V2}/ModelInfer": f"{MODEL}/infer",
    f"{V2}/ModelStreamInfer": "",
    f"{V2}/ModelConfig": f"{MODEL}/config",
    f"{V2}/ModelStatistics": f"{MODEL}/stats",
    f"{V2}/RepositoryIndex": "/v2/repository/index",
    f"{V2}/RepositoryModelLoad": "/v2/repository/models/M/load",
    f"{V2}/RepositoryModelUnload": "/v2/repository/models/M/unload",
    **{
        f"{V2}/{kind}SharedMemory{what}": f"/v2/{kind.lower()}{REGION}/{what.lower()}"
        for kind in ("System", "Cuda")
        for what in ("Status", "Register", "Unregister")
    },
    f"{V2}/TraceSetting": "/v2/trace/setting",
    f"{V2}/LogSettings": "/v2/logging",
    "REST/generate": f"{MODEL}/generate",
    "REST/generate_stream": f"{MODEL}/generate_stream",
    "REST/openapi": "/openapi.json",
    "Health/Check": "",
    "Health/Watch": "",
    "ServerReflection/ServerReflectionInfo": "",
    "PredictionService/Predict": "/v1/models/M:predict",
    "PredictionService/Classify": "/v1/models/M:classify",
    "PredictionService/Regress": "/v1/models/M:regress",
    "PredictionService/MultiInference": "",
    "PredictionService/GetModelMetadata": "/v1/models/M/metadata",
    "ModelService/GetModelStatus": "/v1/models/M",
    "ModelService/HandleReloadConfigRequest": "",
}
#: The columns; "HTTP" are curl, h2load and httpx.
CLIENTS = (
    *("tritonclient.grpc", "tritonclient.grpc.aio", "tritonclient.http", "tritonclient.http.aio"),
    *("tensorflow-serving-api", "@grpc/grpc-js", "grpcio", "grpclib", "HTTP", "aiorch_client"),
)
#: What a client has no method for.
LACKING = (
    ("tritonclient.*", ("REST/*", "Health/*", "ServerReflection/*", "PredictionService/*", "ModelService/*")),
    ("tritonclient.http*", (f"{V2}/ModelStreamInfer",)),
    ("tensorflow-serving-api", (f"{V2}/*", "REST/*", "Health/*", "ServerReflection/*")),
    ("aiorch_client", ("*/*SharedMemory*", f"{V2}/TraceSetting", f"{V2}/LogSettings")),
    ("aiorch_client", ("REST/*", "Health/*", "ServerReflection/*", "PredictionService/*", "ModelService/*")),
    ("@grpc/grpc-js", ("REST/*",)),
    ("grpc*", ("REST/*",)),
)


def names(call: str, pattern: str) -> bool:
    """Whether ``pattern`` means ``call``, with its service or without."""
    return fnmatchcase(call, pattern) or fnmatchcase(call.partition("/")[2], pattern)


def is_lacking(client: str, call: str) -> bool:
    """Whether ``client`` cannot make ``call`` at all."""
    if client == "HTTP" and not CALLS[call]:
        return True
    return any(
        fnmatchcase(client, whose) and any(names(call, pattern) for pattern in patterns) for whose, patterns in LACKING
    )


def list_marks() -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """Each mark's test, calls and clients; raises ValueError for one that names none of the table's."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            for mark in getattr(node, "decorator_list", ()) if isinstance(node, ast.stmt) else ():
                if not (isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.proves"):
                    continue
                patterns = [ast.literal_eval(argument) for argument in mark.args]
                (by,) = (ast.literal_eval(keyword.value) for keyword in mark.keywords if keyword.arg == "by")
                test = f"{path.relative_to(ROOT / 'tests')}::{getattr(node, 'name', '')}"
                calls = [(pattern, [call for call in CALLS if names(call, pattern)]) for pattern in patterns]
                clients = [
                    (pattern, [client for client in CLIENTS if fnmatchcase(client, pattern)])
                    for pattern in ([by] if isinstance(by, str) else by)
                ]
                for pattern, found in [*calls, *clients]:
                    if not found:
                        raise ValueError(f"{test}: {pattern!r} is none of the calls or clients of {__file__}")
                yield test, *(tuple(name for _, found in each for name in found) for each in (calls, clients))


def collect() -> dict[tuple[str, str], list[str]]:
    """The tests of each call and client."""
    found: dict[tuple[str, str], list[str]] = {}
    for test, calls, clients in list_marks():
        for call in calls:
            for client in clients:
                if not is_lacking(client, call):
                    found.setdefault((call, client), []).append(test)
    return found


def write_table() -> str:
    """Calls by clients, with numbers of the tests that follow below."""
    found = collect()
    numbers: dict[str, int] = {}
    lines = ["| | " + " | ".join(CLIENTS) + " |", "|---|" + "---|" * len(CLIENTS)]
    for call, route in CALLS.items():
        cells = []
        for client in CLIENTS:
            tests = found.get((call, client), [])
            cells.append(", ".join(str(numbers.setdefault(test, len(numbers) + 1)) for test in tests))
            if not tests and is_lacking(client, call):
                cells[-1] = "-"
        lines.append(f"| {call.partition('/')[2]}{f'<br>`{route}`' if route else ''} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{number}. `{test}`" for test, number in numbers.items())]) + "\n"


def render(page: str) -> str:
    """The page with a table that is up to date."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{write_table()}\n{END}{tail}"


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text()))
