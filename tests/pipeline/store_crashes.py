"""Runs a command over and over, each time killed (SIGKILL) at some fault point, until it survives.

Called as `store_crashes.py SEED FOLDER ARGUMENT...`, with the output folder in an object store. After each kill a
reader has to find finished work at FOLDER, or none. Prints the number of kills.
"""

import os
import random
import sys

from sstoken.errors import SstokenError
from sstoken.stages import faults
from sstoken.stages import manifest as manifests


def main(seed: str, folder: str, arguments: list[str]) -> int:
    import transformers  # noqa: F401

    from sstoken.pipeline import cli
    from sstoken.pipeline.verbs import stages  # noqa: F401

    kills, random_ = 0, random.Random(seed)
    while True:
        at = random_.randrange(1, 20 if kills < 3 else 60)
        child = os.fork()  # after the heavy imports, before anything speaks to the store
        if child == 0:
            os.environ[faults.VARIABLE] = f"kill:any:{at}"
            cli.main(arguments)  # exits
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            print(kills)
            return os.waitstatus_to_exitcode(status)
        kills += 1
        looking = os.fork()
        if looking == 0:
            os._exit(0 if _is_sound(folder) else 1)
        if os.waitpid(looking, 0)[1]:
            print(f"half-done work is visible after {kills} kills")
            return 1


def _is_sound(folder: str) -> bool:
    """Whether a reader finds finished work, or none."""
    from sstoken.stages import storage

    place = storage.address(folder)
    try:
        found = manifests.read_manifest(place)
        return found is None or not list(manifests.problems(place, found))
    except SstokenError as error:
        print(error)
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
