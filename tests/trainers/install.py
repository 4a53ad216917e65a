"""Environments of real trainers, one each: `python tests/trainers/install.py NAME...`.

An environment sees the packages of the one that runs this (torch above all) and has its own, which
`requirements/NAME.txt` lists in full, before them. Nothing is resolved: no other torch is ever drawn in.
"""

import hashlib
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1] / ".venv-trainers"


def requirements(name: str) -> Path:
    """The trainer's list; there is none for those of the development environment itself."""
    return HERE / "requirements" / f"{name}.txt"


def interpreter(name: str) -> Path:
    """The Python that has the trainer."""
    return ROOT / name / "bin" / "python" if requirements(name).exists() else Path(sys.executable)


def installed(name: str) -> bool:
    """Whether its environment is there, with what its list says now."""
    mark = ROOT / name / ".ready"
    listed = requirements(name)
    return not listed.exists() or (mark.exists() and mark.read_text() == _digest(listed))


def install(name: str) -> None:
    """Make its environment."""
    folder, listed = ROOT / name, requirements(name)
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
    purelib = next((folder / "lib").glob("python*")) / "site-packages"
    (purelib / "beneath.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install"]
    quiet = ["--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *quiet, "--no-deps", "--ignore-installed", "-r", listed], check=True)
    (folder / ".ready").write_text(_digest(listed))


def _digest(listed: Path) -> str:
    return hashlib.sha256(listed.read_bytes()).hexdigest()


if __name__ == "__main__":
    for trainer in sys.argv[1:]:
        if not installed(trainer):
            print(f"installing {trainer}", flush=True)
            install(trainer)
