"""Engines: how a function is mapped over tasks.

To add one, write a class with `sstoken.stages.stage.Engine`'s methods whose constructor takes an `EngineOptions`, rank
and world size, and name it in `ENGINES`; or declare it in a package of your own as an entry point of the group
`sstoken.engines` (`name = "module:class"`). Nothing else changes.
"""

from importlib import import_module, metadata

from sstoken.errors import UsageError
from sstoken.stages.stage import Engine, EngineOptions

ENGINES = {
    "local": "sstoken.pipeline.engines.local:LocalEngine",
    "ray": "sstoken.pipeline.engines.on_ray:RayEngine",
}
"""Name to `module:class`; the module is imported when the engine is used."""
ENTRY_POINTS = "sstoken.engines"
"""The group in which other packages declare theirs."""


def make_engine(options: EngineOptions, rank: int = 0, world_size: int = 1) -> Engine:
    """Return the engine of that name, for one of `world_size` parts of the work.

    Raises:
        UsageError: there is none of that name, or the rank is out of range.
    """
    if not rank < world_size:
        raise UsageError(f"rank is {rank} and world_size is {world_size}; legal is 0 to {world_size - 1}")
    place = ENGINES.get(options.engine)
    if place is None:  # asked second: others are found by a look at every installed package
        known = {point.name: point.value for point in metadata.entry_points(group=ENTRY_POINTS)} | ENGINES
        place = known.get(options.engine)
        if place is None:
            raise UsageError(f"engine {options.engine!r} is not known; legal: {', '.join(known)}")
    module, _, name = place.partition(":")
    engine: Engine = getattr(import_module(module), name)(options, rank, world_size)
    return engine
