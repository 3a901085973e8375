"""Plumbing without models: errors, files, ranks, devices, the start of a command. Imports no other directory."""

import sys

try:
    import fcntl  # noqa: F401
except ModuleNotFoundError:  # every command imports this package before anything that needs fcntl
    print("error: rawgpt runs on Linux and macOS; on Windows use WSL", file=sys.stderr)
    sys.exit(2)
