"""The Hub on localhost as a process of its own, for clients that are forked and killed."""

import atexit
import os
import signal
from pathlib import Path


def start(folder: Path) -> str:
    """Start it, and point this process's clients at it; before anything imports huggingface_hub."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _serve(folder, write)
    atexit.register(os.kill, child, signal.SIGKILL)
    os.close(write)
    with os.fdopen(read) as answer:
        url, token = answer.readline().split()
    os.environ |= {
        "HF_ENDPOINT": url,
        "HF_TOKEN": token,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    os.environ.pop("HF_HUB_OFFLINE", None)
    return url


def _serve(folder: Path, answer: int) -> None:
    import threading

    from tests.pipeline.hub.server import WRITE, serve
    from tests.pipeline.hub.store import Hub

    server = serve(Hub(folder / "hub"))
    os.write(answer, f"{server.url} {WRITE}\n".encode())
    os.close(answer)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # clients that are killed are no news
    threading.Event().wait()
