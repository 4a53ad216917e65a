"""`SelfModulatedSFTTrainer`: TRL's SFT trainer with in-loop selection. Needs `pip install trl`."""

from trl import SFTTrainer

from sstoken.in_loop.trainer import SelfModulatedMixin


class SelfModulatedSFTTrainer(SelfModulatedMixin, SFTTrainer):
    """`trl.SFTTrainer` with in-loop selection, packed, padding-free or padded."""
