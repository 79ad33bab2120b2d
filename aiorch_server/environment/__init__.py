"""The simulated server for research on batching policies: needs the extra ``gym``, and nothing else imports it.

``import aiorch_server.environment`` registers the environment with Gymnasium, as ``ID``.
"""

from __future__ import annotations

from typing import Final

try:
    import gymnasium
except ImportError as error:
    raise ImportError(f"the environment needs the extra 'gym' (pip install 'aiorchestrator[gym]'): {error}") from error

from aiorch_server.environment.batching import BatchingEnvironment

ID: Final = "AIOrchestrator/Batching-v0"

__all__ = ["ID", "BatchingEnvironment"]

if ID not in gymnasium.registry:
    gymnasium.register(ID, entry_point="aiorch_server.environment.batching:BatchingEnvironment")
