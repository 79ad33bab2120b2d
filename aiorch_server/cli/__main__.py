"""``python -m aiorch_server.cli``: the command line where the script ``aiorch`` is not installed."""

from aiorch_server.cli import main

main()
