"""Which free parameters of a model's configuration mean something: to the server, to its backend, or elsewhere only.

A name that nobody reads is an error, or a misspelt ``cpu_threads`` would be served with the default.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from aiorch_server.config.labels import PREFIX as LABEL_PREFIX
from aiorch_server.config.problems import Problem, suggest
from aiorch_server.errors import ModelLoadError

#: What the server reads itself, for all backends.
SERVER_PARAMETERS = ("cpu_threads", "isolate_failures", "objective", "tuning", "warmup")
#: Triton's names for what has another name here.
_RENAMED: Mapping[str, str] = {
    "INTRA_OP_THREAD_COUNT": "cpu_threads",
    "TF_NUM_INTRA_THREADS": "cpu_threads",
    "TF_SIGNATURE_DEF": "signature_name",
}
#: Triton's names for how its backends compute; no answer depends on them.
_HINTS = frozenset(
    {
        *("DISABLE_OPTIMIZED_EXECUTION", "INFERENCE_MODE", "INTER_OP_THREAD_COUNT", "ENABLE_CACHE_CLEANING"),
        *("ENABLE_JIT_EXECUTOR", "ENABLE_JIT_PROFILING", "ENABLE_NVFUSER", "ENABLE_TENSOR_FUSER"),
        *("ENABLE_TORCH_CUDNN", "ENABLE_WEIGHT_SHARING", "MAX_SESSION_SHARE_COUNT", "TF_NUM_INTER_THREADS"),
        *("TF_USE_PER_SESSION_THREADS", "cudnn_conv_algo_search", "cudnn_conv_use_max_workspace"),
        *("do_copy_in_default_stream", "enable_mem_arena", "enable_mem_pattern", "execution_mode"),
        *("inter_op_thread_count", "memory.enable_memory_arena_shrinkage"),
    }
)
_TRITONS = ("TRITON_", "TF_")
#: Those of the server that are on unless they say false.
FLAGS = ("isolate_failures", "warmup")


def read_flag(parameters: Mapping[str, str], name: str) -> bool:
    """Whether one of FLAGS is on; ModelLoadError for anything but true or false."""
    value = parameters.get(name, "true").strip().lower()
    if value not in ("true", "1", "false", "0"):
        raise ModelLoadError(f"parameter '{name}' is '{value}', true or false is right")
    return value in ("true", "1")


def find_unknown_parameters(names: Collection[str], backend: str, read: Collection[str]) -> Iterator[Problem]:
    """Yields a problem for each name that neither the server nor ``backend``, which reads ``read``, knows."""
    known = {*SERVER_PARAMETERS, *read}
    for name in sorted(names):
        if name in known or name in _HINTS or name.startswith(LABEL_PREFIX):
            continue
        renamed = _RENAMED.get(name)
        if renamed in known:
            text = f"is a parameter of Triton's; here it is '{renamed}'"
        elif renamed or name.startswith(_TRITONS):
            text = f"is a parameter of Triton's that backend '{backend}' does not have here; remove it"
        else:
            names_here = [*known, f"{LABEL_PREFIX}<label>"]
            text = f"is unknown to backend '{backend}'{suggest(name, names_here)}"
        yield Problem(("parameters", name), text)


def find_idle_parameters(names: Collection[str], read: Collection[str]) -> Iterator[str]:
    """Yields one sentence for each name that is accepted but changes nothing."""
    for name in sorted(_HINTS.intersection(names).difference(read)):
        yield f"parameters.{name} has no effect: it says how Triton's backends compute"
