"""The table of the comparison: what is asked, who answers, and over how many connections and streams."""

from __future__ import annotations

from dataclasses import dataclass

Shape = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Contest:
    """One workload for some servers, each started with it alone; ``text`` says what is special, for the page.

    ``shapes`` are connections x streams per connection, as ``h2load -c -m`` takes them.
    """

    name: str
    workload: str
    servers: tuple[str, ...]
    shapes: tuple[Shape, ...]
    text: str
    has_tls: bool = False
    is_busy: bool = False

    @property
    def turns(self) -> tuple[tuple[str, ...], ...]:
        """Which servers may be up together: all, unless they are busy while nobody asks them anything."""
        return tuple((name,) for name in self.servers) if self.is_busy else (self.servers,)


PEERS = ("aiorch", "triton", "grpc_aio", "mosec")
SMALL: tuple[Shape, ...] = ((1, 1), (8, 1), (32, 1), (8, 8), (32, 32))

CONTESTS = (
    Contest("identity", "identity", PEERS, SMALL, "Echoes FP32 [4], 16 bytes: nothing but the server's own cost."),
    Contest(
        "mlp",
        "mlp",
        PEERS,
        (*SMALL[:4], (8, 16), SMALL[4]),
        "784-256-10 in ONNX Runtime, trained on scikit-learn's digits enlarged to 28x28; 3 KB a request.",
    ),
    Contest(
        "image",
        "image",
        PEERS,
        ((1, 1), (8, 1), (32, 1), (8, 8)),
        "FP32 [3,224,224], 602 KB a request, into one small convolution in ONNX Runtime; 64 bytes of answer.",
    ),
    Contest(
        "minilm",
        "minilm",
        PEERS,
        ((1, 1), (32, 1)),
        "The sentence embedding all-MiniLM-L6-v2 in ONNX Runtime, INT64 [64] ids and mask. The model's time is nearly "
        "everything; what a server can do is to lose little of it.",
    ),
    Contest(
        "identity-tls",
        "identity",
        ("aiorch", "triton", "grpc_aio"),
        ((8, 8), (32, 1)),
        "The same echo with TLS 1.3 on every connection.",
        has_tls=True,
    ),
    Contest(
        "identity-busy",
        "identity",
        ("aiorch", "aiorch_asyncio", "aiorch_asyncio_5ms"),
        ((8, 1),),
        "The same echo while a thread in pure Python is always busy in the server's process, and on the same core: its "
        "I/O threads against its asyncio driver (`--io-threads 0`), with the server's switch interval "
        "(`execution.switch_interval_us`) and with Python's own.",
        is_busy=True,
    ),
)
