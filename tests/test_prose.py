"""Plain English: the worst patterns stay out of docstrings, comments, help texts and pages.

A directory is checked with, say, ``pytest tests/test_prose.py -k structmat/cli/``.
"""

import ast
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")])
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])

ANYWHERE = {
    r"\blikewise\b": "say it again, or name what it is like",
    r"\bas it (is|stands)\s*([.;:,)]|$)": "say 'unchanged', or what it is",
    r"\b(go|goes|going|went) on where\b": "say 'resumes'",
    r"\b1/\d+(\.\d+)? of (its|the|their) time\b": "say how many times faster it is",
    r"\b(takes|gives|needs) besides\b": "name the arguments",
    r"\bso many\b(?! (\w+ )?that\b)": "say 'this many', or name the number",
    r"\bsee there\b|\bas there\b|\bas above\b": "name the place",
    r"\bwhat there is to\b": "name the things",
    r"\band so (is|are) everything\b": "name the arguments",
    r"\b(an|for|in|of|with) own\b": "say whose own",
    r"[;,] beyond[,:]": "say 'above that'",
}
"""Patterns that no text may contain, with the remedy."""

RIDDLES = {
    r"(Of|Those|At which|Up to which|Beyond)\b": "begin with the noun that is meant",
    r"That\b(?! (is|was)\b)": "begin with the noun that is meant",
    r"There\b(?! (is|are|was|were)\b)": "name the place",
    r"As (in|for|the|of|that|there|above)\b": "say what it is, then 'as in'",
    r"(What|Which|Where|How|Why|When|One|Both|All|None|Some|Candidates|Entered)\W*$": "say it in a noun phrase",
}
"""Patterns with which no docstring, argument, attribute, constant or help text begins."""

DANGLING = {
    r"(At(?! least| most)|In(?! features)|Up to(?! this)|Over(?!-))\b(?![^.;:]*,)": "begin with an article or a noun",
    r"(By|For|From|Into|On|To|Under|With|Without|After|Before|Beside)\b(?![^.;:]*,)": "begin with an article or a noun",
    r"It\b": "begin with an article or a noun",
    r"Where\b[^.]*\b(does|do) not say\b": "say whose default it is",
}
"""Patterns with which no description of an argument, attribute, constant or option begins either."""

ALONE = {
    r"(Its|Their|They)\b": "name whose: a help text is read alone",
    r"\w+ of (it|them|these)\b": "name what: a help text is read alone",
}
"""Patterns with which no help text begins either."""


class Text(NamedTuple):
    """A piece of prose: its line in the file, what it is, and its words on one line."""

    line: int
    kind: str  # "summary", "entry", "help" or "other"
    words: str


def joined(lines: list[str]) -> str:
    """Lines as one."""
    return " ".join(" ".join(lines).split())


SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises):$")
ENTRY = re.compile(r" {4}[*\w.]+(?: \([^)]*\))?: (.*)")


def texts_of_section(name: str, lines: list[str], first: int) -> Iterator[Text]:
    """What a section of a docstring says: each entry, or for what is returned the whole."""
    if name in ("Returns", "Yields"):
        yield Text(first, "entry", joined(lines))
        return
    kind = (
        "other" if name == "Raises" else "entry"
    )  # what is raised is told by a condition, such as "For a wrong shape."
    starts = [k for k, line in enumerate(lines) if ENTRY.match(line)]
    for k, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        yield Text(first + k, kind, joined([ENTRY.sub(r"\1", lines[k]), *lines[k + 1 : end]]))


def texts_of_docstring(docstring: str, first: int, kind: str) -> Iterator[Text]:
    """The paragraphs and entries of a docstring whose first line is ``first``; the first paragraph is of this kind."""
    lines = inspect.cleandoc(docstring).splitlines()
    k = 0
    while k < len(lines):
        end = next((m for m in range(k, len(lines)) if not lines[m].strip()), len(lines))
        section = SECTION.match(lines[k])
        if section:
            yield from texts_of_section(section[1], lines[k + 1 : end], first + k + 1)
        else:
            yield Text(first + k, kind if k == 0 else "other", joined(lines[k:end]))
        k = end + 1


def constant_parts(node: ast.AST) -> str:
    """The text of a string or an f-string, with ``…`` in the place of what is computed."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return ""


def texts_of_python(source: str) -> Iterator[Text]:
    """Docstrings, descriptions of attributes and constants, help texts, and comments."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", [])
        body = body if isinstance(body, list) else []
        for k, statement in enumerate(body):
            value = getattr(statement, "value", None)
            if isinstance(statement, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                described = k > 0 and isinstance(body[k - 1], (ast.Assign, ast.AnnAssign))
                yield from texts_of_docstring(value.value, value.lineno, "entry" if described else "summary")
        if isinstance(node, ast.keyword) and node.arg == "help":
            yield Text(node.value.lineno, "help", joined([constant_parts(node.value)]))
    yield from texts_of_comments(source)


def texts_of_comments(source: str) -> Iterator[Text]:
    """Comments; those on successive lines are one."""
    first, last, words = 0, 0, []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line = token.start[0]
            if words and line != last + 1:
                yield Text(first, "other", joined(words))
                words = []
            first = first if words else line
            last = line
            words.append(token.string.lstrip("# "))
    if words:
        yield Text(first, "other", joined(words))


def texts_of_page(source: str) -> Iterator[Text]:
    """The paragraphs of a Markdown page, without its code."""
    prose = re.sub(r"^```.*?^```$", lambda code: "\n" * code[0].count("\n"), source, flags=re.DOTALL | re.MULTILINE)
    for paragraph in re.finditer(r"(?:^.*\S.*$\n?)+", prose, re.MULTILINE):
        if not paragraph[0].startswith("    "):
            yield Text(prose.count("\n", 0, paragraph.start()) + 1, "other", joined(paragraph[0].splitlines()))


def problems(texts: Iterator[Text]) -> list[str]:
    """What is wrong with these texts, each with its line, its words and the remedy."""
    beginnings = {
        "summary": RIDDLES,
        "entry": RIDDLES | DANGLING,
        "help": RIDDLES | DANGLING | ALONE,
        "other": {},
    }
    found = []
    for line, kind, words in texts:
        remedies = [
            remedy for pattern, remedy in beginnings[kind].items() if re.match(pattern, words[:1].upper() + words[1:])
        ]
        remedies += [remedy for pattern, remedy in ANYWHERE.items() if re.search(pattern, words, re.IGNORECASE)]
        found += [f"line {line}: {remedy}: {textwrap.shorten(words, 110)!r}" for remedy in remedies]
    return found


def refuse(path: Path, found: list[str]) -> None:
    """Fail with all problems of a file, each on a line of its own."""
    if found:
        pytest.fail("\n".join([f"{identify(path)}: {len(found)} problems", *found]), pytrace=False)


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PYTHON, ids=identify)
def test_the_prose_of_code(path: Path) -> None:
    refuse(path, problems(texts_of_python(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("path", PAGES, ids=identify)
def test_the_prose_of_pages(path: Path) -> None:
    refuse(path, problems(texts_of_page(path.read_text(encoding="utf-8"))))


SAMPLE = '''"""A module.

That is fine in a second paragraph.
"""
RATE = 3
"""At which it runs."""
GOOD = 4
"""The rate at which it runs."""


def those(x, y, z, *args):
    """Those of a layer.

    Args:
        x: Of the layer.
        y: The layer's name,
            likewise.
        z (int): In the end, the value.
        *args: Likewise.

    Returns:
        Both.

    Raises:
        ValueError: For a wrong shape.
    """
    raise ValueError  # left as it is


class Kind:
    """A kind.

    Attributes:
        a: On a device.
        b: So many of them.
        c: There are many of them.
        d: Up to this many; beyond, none.
    """

    a: int
    b: int = 2
    """That of the format."""


option(help=f"By default {RATE}.")
option(help="Its learning rate.")
option(help="The learning rate, so large that it diverges, and so many layers that it is slow.")
'''


def test_the_check_finds_its_texts_in_code() -> None:
    lines = {int(problem.split()[1].rstrip(":")) for problem in problems(texts_of_python(SAMPLE))}
    assert sorted(lines) == [6, 12, 15, 16, 19, 22, 27, 34, 35, 37, 42, 45, 46]


WRONG = """\
As in the format.
At its peak.
Beyond the cache.
By layer.
Both.
How.
It may be on a GPU.
Into how many parts the axis is cut.
Its rate.
Of a layer.
Over all layers.
Steps of it, per block.
That of a layer.
There.
Those of a layer.
Up to which it is kept.
Where a format does not say.
The rows, likewise.
A layer left as it is.
A run that goes on where it stopped.
A fit in 1/9.9 of its time.
Whatever a kernel takes besides.
The time of so many tokens.
The value, see there.
What there is to draw.
Data, and so is everything else.
A folder with own tasks.
Up to 4 tokens; beyond, none.
""".splitlines()
RIGHT = """\
A layer of that format.
If the layer is there already.
In bytes, the size of the layer.
In features.
Its own rank.
One of ``NAMES``; None for the first.
The dtype of its factors, as it is stored.
There are layers of that kind.
A rate so large that training fails.
What the layer costs.
Where to write the file.
At least 1.
For each layer, its factors.
Beyondness.
Over-relaxation.
""".splitlines()


@pytest.mark.parametrize("words", WRONG)
def test_the_check_refuses(words: str) -> None:
    assert problems(iter([Text(1, "help", words)])) != []


@pytest.mark.parametrize("words", RIGHT)
def test_the_check_allows(words: str) -> None:
    assert problems(iter([Text(1, "entry", words)])) == []


def test_every_pattern_has_an_example() -> None:
    remedies = {remedy for patterns in (ANYWHERE, RIDDLES, DANGLING, ALONE) for remedy in patterns.values()}
    shown = {problem.split(": ")[1] for problem in problems(Text(1, "help", words) for words in WRONG)}
    assert {remedy.partition(": ")[0] for remedy in remedies} == shown


def test_the_check_sees_pages() -> None:
    page = """# A page

It goes on where it was interrupted, in
1/9.9 of its time.

```python
x = 1  # likewise
```

    likewise

- Of the two, this is fine.
- This one is left as it
  is.
"""
    assert [problem.split(": ")[:2] for problem in problems(texts_of_page(page))] == [
        ["line 3", "say 'resumes'"],
        ["line 3", "say how many times faster it is"],
        ["line 12", "say 'unchanged', or what it is"],
    ]


def test_the_failure_names_line_remedy_and_text() -> None:
    assert problems(texts_of_python('"""Of a layer."""\n')) == [
        "line 1: begin with the noun that is meant: 'Of a layer.'"
    ]


def test_every_kind_of_text_is_found_in_the_code() -> None:
    kinds = [text.kind for path in PYTHON for text in texts_of_python(path.read_text(encoding="utf-8"))]
    assert {kind: kinds.count(kind) > 50 for kind in ("summary", "entry", "help", "other")} == dict.fromkeys(
        ("summary", "entry", "help", "other"), True
    )
