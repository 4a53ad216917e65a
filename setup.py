"""Give PyPI a README without relative links and pictures, which lead nowhere there. All else is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup


def readme_for_pypi(text: str) -> str:
    """Drop relative pictures, and write relative links out: the files are in the source distribution."""
    text = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n*", "", text)

    def written_out(link: re.Match[str]) -> str:
        label, target = link.groups()
        return label if label == target else f"{label} ({target})"

    return re.sub(r"\[([^]]*)\]\((?!https?:|#)([^)#]*)[^)]*\)", written_out, text)


if __name__ == "__main__":
    readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    setup(long_description=readme_for_pypi(readme), long_description_content_type="text/markdown")
