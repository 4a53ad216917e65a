"""The version, alone in its file so that packaging and fingerprints read it without importing more."""

__version__ = "0.1.0"
