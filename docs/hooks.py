"""What `mkdocs build` does besides: the README is the first page, the glossary a page, and llms.txt."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).parent.parent
_VERBS = "<!-- verbs: written in by hooks.py -->"
_TITLE = re.compile(r"^# (.+)$", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add the README as the first page, and the glossary as a page of its own."""
    readme = (_ROOT / "README.md").read_text(encoding="utf-8")
    inside = re.sub(r"(\]\()docs/", r"\1", _written_out(readme, _ROOT))
    files.append(File.generated(config, "index.md", content=inside))
    words = (_ROOT / "docs/architecture.md").read_text(encoding="utf-8").partition("## Glossary\n")[2]
    files.append(File.generated(config, "glossary.md", content=f"# Glossary\n{words}"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Write out links to files of the repository that are no pages."""
    if _VERBS in markdown:
        markdown = markdown.replace(_VERBS, "\n\n".join(map(_described, _verbs())))
    return _written_out(markdown, _ROOT / "docs")


def _verbs() -> list[Callable[..., Any]]:
    """The functions of `sstoken.curate`, made when asked for: no parser of source text finds them."""
    from sstoken import curate
    from sstoken.pipeline.verbs import verbs

    return [getattr(curate, name) for name in [*verbs(), "observed"] if hasattr(curate, name)]


def _described(function: Callable[..., Any]) -> str:
    """Return a verb's signature and docstring in Markdown."""
    signature = inspect.signature(function)
    parameters = [f"    {p.replace(annotation=p.empty)}," for p in signature.parameters.values()]
    head = "\n".join([f"{function.__name__}(", *parameters, ")"])
    about = inspect.getdoc(function) or ""
    about = re.sub(r"^Example:\n\s+(.+)$", r"On the command line: `\1`", about, flags=re.MULTILINE)
    about = re.sub(r"^(Args|Returns|Raises):$", r"**\1**\n", about, flags=re.MULTILINE)
    about = re.sub(r"^ {4}(\w+): ", r"- `\1`: ", about, flags=re.MULTILINE)
    return f"### {function.__name__}\n\n```python\n{head}\n```\n\n{about}"


def on_post_build(config: Any) -> None:
    """Write llms.txt: every page with its title and its first sentence, and llms-full.txt: their text."""
    listed, full = [], []
    for path in [_ROOT / "README.md", *sorted((_ROOT / "docs").glob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        title = _TITLE.search(text)
        assert title is not None, f"{path}: no title"
        name = "index.html" if path.name == "README.md" else f"{path.stem}/index.html"
        listed.append(f"- [{title[1]}]({name}): {_first_sentence(text)}")
        full.append(text)
    site = Path(config["site_dir"])
    summary = f"# {config['site_name']}\n\n> {config['site_description']}\n\n## Pages\n\n" + "\n".join(listed)
    (site / "llms.txt").write_text(summary + "\n", encoding="utf-8")
    (site / "llms-full.txt").write_text("\n\n".join(full), encoding="utf-8")


def _written_out(text: str, folder: Path) -> str:
    """Replace links from `folder` to files outside docs/ by their labels and paths; addresses and anchors stay."""

    def replaced(link: re.Match[str]) -> str:
        label, target = link.groups()
        place = (folder / target.partition("#")[0]).resolve()
        if place.is_relative_to(_ROOT / "docs") and place.suffix in (".md", ".svg", ".png", ".json"):
            return link[0]
        shown = target.removeprefix("../")
        return label if label.strip("`") == shown else f"{label} (`{shown}`)"

    return re.sub(r"(?<!!)\[([^]]*)\]\((?!https?:|#)([^)\s]*)\)", replaced, text)


def _first_sentence(text: str) -> str:
    paragraphs = [p for p in re.split(r"\n\s*\n", text) if not re.match(r"#|!|\||```|- |<|:::", p.strip())]
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(paragraphs[0].split())) if paragraphs else ""
    return re.split(r"(?<=[.?!])\s", plain)[0]
