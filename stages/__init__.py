"""One file per stage: each reads finished folders and writes one."""
