"""`SelfModulatedSFTTrainer`: TRL's SFT trainer with in-loop selection. Needs `pip install trl`."""

import trl
from packaging.version import Version
from trl import SFTTrainer

from sstoken.in_loop.trainer import SelfModulatedMixin

if Version(trl.__version__) < Version("1.7"):  # older ones drop labels when packing
    raise ImportError(
        f"SelfModulatedSFTTrainer needs TRL 1.7 or newer, and this is {trl.__version__}: pip install -U trl"
    )


class SelfModulatedSFTTrainer(SelfModulatedMixin, SFTTrainer):
    """`trl.SFTTrainer` with in-loop selection, packed, padding-free or padded."""
