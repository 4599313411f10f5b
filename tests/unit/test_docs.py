"""The documents' command lines: every vmmctl line that they show is one that vmmctl takes."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from motorcade.orchestrator import cli, config
from motorcade.orchestrator.cmdline import source, translate
from motorcade.orchestrator.commands import run

PARSER = cli.parser()
REPO = Path(__file__).resolve().parents[2]
PAGES = [REPO / "README.md", *sorted(p for p in (REPO / "docs").glob("*.md") if p.name != "internals.md")]
# Up to what ends a command: a word of explanation two spaces further, a comment, another command.
COMMAND = re.compile(r"""(?:'[^']*'|"[^"]*"|(?!  |\t| \#| [<>|;&]|; )[^'"])*""")


def joined(text: str) -> str:
    """Without the line breaks that are the shell's."""
    return re.sub(r"\\\n *", "", text)


def lines(page: Path) -> Iterator[str]:
    """The commands of a page, each from its vmmctl on: in blocks of code, and between backticks."""
    text = joined(page.read_text())
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    blocks += re.findall(r"(?:^ {4}.*\n)+", prose, re.MULTILINE)
    for block in blocks:
        for line in block.splitlines():
            for part in re.split(r"(?:^|(?<=[ ;|&]))(?=vmmctl )", line.strip()):
                if part.startswith("vmmctl "):
                    yield COMMAND.match(part)[0]
    for part in re.findall(r"`(vmmctl [^`]*)`", prose):
        yield COMMAND.match(part)[0]


def examples() -> Iterator[tuple[str, str]]:
    """Those of every command's --help."""
    [commands] = [action for action in PARSER._actions if isinstance(action, argparse._SubParsersAction)]
    for command, parser in sorted(commands.choices.items()):
        for line in joined(parser.epilog or "").splitlines():
            if line.startswith("  vmmctl "):
                yield f"vmmctl {command} --help", COMMAND.match(line.strip())[0]


SHOWN = sorted({*((page.name, line) for page in PAGES for line in lines(page)), *examples()})


def test_there_are_many() -> None:
    assert len(SHOWN) > 60
    assert {name for name, _ in SHOWN} >= {"README.md", "vmmctl.md", "clones.md", "vmmctl run --help"}


@pytest.mark.parametrize(("page", "line"), SHOWN)
def test_every_command_shown_is_one(page: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As far as its words are not left to the reader: [...], ..., COMMAND. What has a command's name, or its name and
    options, as in `vmmctl up --name`, is a mention."""
    words = shlex.split(line)[1:]
    if "[" in line or {"...", "COMMAND", "──"} & {word.rstrip(",:") for word in words}:
        pytest.skip("only the shape of a command")
    names = [word for word in words if re.fullmatch("[a-z]+", word)]
    options = [word for word in words if word.startswith("--")]
    mention = len(names) <= 2 and len(names) + len(options) == len(words)
    try:
        args = PARSER.parse_args([*names, "--help"] if mention else words)
    except SystemExit as e:
        said = capsys.readouterr()
        assert e.code == 0, f"{page}: {line}: {said.err}"
        assert [option for option in options if option not in said.out] == []
        return
    if args.run is run.run and args.words:
        wish = translate.translate(args.words)
        config.complete(wish.data, source.CommandLine(wish.data, wish.places), Path("/"))
