"""The older name of `sstoken.curate`: importing this module returns that one."""

import sys
from typing import TYPE_CHECKING

from sstoken import curate

if TYPE_CHECKING:
    from sstoken.curate import *

sys.modules[__name__] = curate
