"""What the READMEs promise is there: files that they link to, commands and their options."""

import argparse
import re
from pathlib import Path

import pytest

from clipcap_lib import cli
from clipcap_lib.config import PRESETS

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README.zh-CN.md")


def links(text: str) -> set[str]:
    return {link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")}


@pytest.mark.parametrize("name", [*READMES, "figures/README.md"])
def test_what_is_linked_is_there(name):
    """A heading of another page as well."""
    path = ROOT / name
    found = links(path.read_text(encoding="utf-8"))
    assert len(found) > (8 if name in READMES else 3)
    for link in found:
        file, _, heading = link.partition("#")
        place = path.parent / file
        assert place.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.+)$", place.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings], link


@pytest.mark.parametrize("name", READMES)
def test_commands_have_the_options_that_they_are_shown_with(name):
    commands = next(a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    shown = re.findall(r"-m clipcap_lib ([a-z-]+)((?: [^\n`#|]*)?)", (ROOT / name).read_text(encoding="utf-8"))
    assert len(shown) > 6
    for command, rest in shown:
        options = commands[command]._option_string_actions
        assert set(re.findall(r"(?<=[ \[])--[a-z-]+", rest)) <= options.keys(), f"{command} {rest}"
        assert set(re.findall(r"--preset ([a-z0-9-]+)", rest)) <= PRESETS.keys()


def test_help_says_of_every_option_what_it_is_and_what_holds_without_it():
    commands = next(a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    for command, options in commands.items():
        for action in options._actions:
            assert action.help, f"{command} {action.dest}"
            if action.default not in (None, False, [], argparse.SUPPRESS):
                assert "(default: " in action.help, f"{command} {action.dest}"


def test_the_chinese_readme_names_the_same_notebooks_and_targets_of_make():
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in READMES)
    notebooks = [{link for link in links(text) if link.endswith(".ipynb")} for text in (english, chinese)]
    assert notebooks[0] == notebooks[1] == {f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("0*.ipynb")}
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)", english.split("## The library")[0])) >= {"workbook", "test", "lab"}
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", english + chinese, re.MULTILINE)) <= targets
