"""A report as a static Space of the Hugging Face Hub: the page, and a README.md with the Space's front matter."""

from pathlib import Path

import yaml

from sstoken.errors import UsageError
from sstoken.stages.storage import write_atomic
from sstoken.stages.token_text import markdown, visible

PAGE, CARD = "index.html", "README.md"


def check_space(folder: Path) -> None:
    """Refuse a folder that holds anything but an earlier Space.

    Raises:
        UsageError: names the first other file.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: a file; name a folder for the Space")
    others = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    strange = [name for name in others if name not in (PAGE, CARD, ".git", ".gitattributes")]
    if strange:
        raise UsageError(f"{folder}: holds {strange[0]}, which is not part of a Space; name an empty folder")


def write_card(folder: Path, title: str, dataset: str | None = None) -> None:
    """Write the README.md beside the page; `dataset` is `user/name` of what the page shows, if it is on the Hub."""
    front = {
        "title": visible(title, newline=" "),
        "emoji": "🔎",
        "colorFrom": "blue",
        "colorTo": "indigo",
        "sdk": "static",
        "app_file": PAGE,
        "pinned": False,
        "tags": ["sstoken", "token-masked"],
        **({"datasets": [dataset]} if dataset else {}),
    }
    of = f" of [{markdown(dataset)}](https://huggingface.co/datasets/{dataset})" if dataset else ""
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000)
    write_atomic(
        folder / CARD,
        f"---\n{text}---\n\nWhich tokens{of} are trained, and why: a report by sstoken. The page holds everything it "
        "shows and loads nothing.\n",
    )
