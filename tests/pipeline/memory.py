"""One verb in a process of its own, which prints its peak memory in MiB.

Called as `memory.py VERB JSON`, the JSON being the arguments of `sstoken.pipeline.api.VERB`; `score` with
`"backend": "idle"` measures nothing and so shows what the stage itself holds.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sstoken.pipeline.cli import set_up_libraries
from sstoken.stages.backends import BACKENDS, Backend, BackendOptions, Measured


class IdleBackend(Backend):
    """Signals out of nothing: the token's id and place, scaled."""

    vocab_size = 1 << 20
    max_length = None

    def __init__(self, options: BackendOptions) -> None:
        self._scale = np.float32(len(options.checkpoint) / 1000)

    def measure(
        self, sequences: Sequence[NDArray[np.int32]], response_masks: Sequence[NDArray[np.bool_]]
    ) -> Iterator[tuple[int, Measured]]:
        for index, (ids, mask) in enumerate(zip(sequences, response_masks, strict=True)):
            loss = (ids[mask] * self._scale).astype(np.float32)
            place = np.flatnonzero(mask).astype(np.float32) / ids.size
            yield index, {"loss": loss, "attention": place}


def peak_mib() -> float:
    """Not `ru_maxrss`: that counts the process which forked this one."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def main(verb: str, arguments: dict[str, object]) -> None:
    if arguments.get("backend") == "idle":
        del arguments["backend"]
        BACKENDS["hf"] = f"{__name__}:IdleBackend"
    if verb == "read":
        from datasets import load_dataset

        for _ in load_dataset("parquet", split="train", streaming=True, **arguments):
            pass
    elif verb == "show":
        from sstoken.stages.report.show import show

        show(Path(str(arguments["masked"])), row=int(str(arguments["row"])))
    else:
        from sstoken.pipeline import api

        getattr(api, verb)(**arguments)
    print(f"\n{peak_mib():.1f}")


if __name__ == "__main__":
    set_up_libraries()  # as on the command line
    main(sys.argv[1], json.loads(sys.argv[2]))
