"""Engines map a function over tasks.

To add one, write a class with the methods of `sstoken.stages.stage.Engine` whose constructor takes `EngineOptions`, a
rank and a world size, and add it to `ENGINES`; or declare it in a package of your own as an entry point of the group
`sstoken.engines` (`name = "module:class"`).
"""

from importlib import metadata
from pkgutil import resolve_name

from sstoken.errors import UsageError
from sstoken.stages.stage import Engine, EngineOptions

ENGINES = {
    "local": "sstoken.pipeline.engines.local:LocalEngine",
    "ray": "sstoken.pipeline.engines.on_ray:RayEngine",
}
"""Name to `module:class`; the module is imported on use."""
ENTRY_POINTS = "sstoken.engines"
"""The entry point group of other packages' engines."""


def make_engine(options: EngineOptions, rank: int = 0, world_size: int = 1) -> Engine:
    """Create the engine that the options name, for rank `rank` of `world_size`.

    Raises:
        UsageError: unknown engine, or the rank is out of range.
    """
    if not rank < world_size:
        raise UsageError(f"rank is {rank} and world_size is {world_size}; legal is 0 to {world_size - 1}")
    place = ENGINES.get(options.engine)
    if place is None:  # entry points last: finding them reads the metadata of every installed package
        known = {point.name: point.value for point in metadata.entry_points(group=ENTRY_POINTS)} | ENGINES
        place = known.get(options.engine)
        if place is None:
            raise UsageError(f"engine {options.engine!r} is not known; legal: {', '.join(known)}")
    engine: Engine = resolve_name(place)(options, rank, world_size)
    return engine
