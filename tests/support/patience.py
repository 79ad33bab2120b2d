"""How much longer than usual a test waits for an answer: once, or as often as ``tests/sanitize/run.py`` says."""

from __future__ import annotations

import os

PATIENCE = float(os.environ.get("AIORCH_TEST_PATIENCE", "1"))
