"""The documentation: public names have a page, pages a place, commands a section."""

import inspect
import pathlib
import re

import pytest

import keras_compress as kc
from keras_compress import callbacks, cli, layers, quantizers

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"
SHOWN = {
    name
    for page in (DOCS / "api").glob("*.md")
    for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
}


def public_objects():
    yield from ((name, getattr(kc, name)) for name in kc.__all__)
    for module in (callbacks, layers, quantizers):
        for name, value in vars(module).items():
            own = getattr(value, "__module__", None) == module.__name__
            if not name.startswith("_") and own:
                yield name, value


@pytest.mark.parametrize("value", [pytest.param(v, id=n) for n, v in public_objects()])
def test_every_public_name_has_its_page(value):
    module = value.__name__ if inspect.ismodule(value) else value.__module__
    assert module in SHOWN or f"{module}.{value.__qualname__}" in SHOWN


def test_every_page_is_in_the_navigation():
    navigation = (DOCS.parent / "mkdocs.yml").read_text()
    for page in DOCS.rglob("*.md"):
        assert f": {page.relative_to(DOCS).as_posix()}\n" in navigation


def test_links_between_pages_lead_somewhere():
    for page in DOCS.rglob("*.md"):
        for target, anchor in re.findall(r"\]\(([\w./]+\.md)(#[\w-]+)?\)", page.read_text()):
            linked = page.parent / target
            assert linked.is_file(), (page, target)
            titles = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            slugs = {
                "#" + re.sub(r"[^\w\s-]", "", t).strip().lower().replace(" ", "-") for t in titles
            }
            assert not anchor or anchor in slugs, (page, anchor)


def test_every_command_is_described():
    page = (DOCS / "command_line.md").read_text()
    commands = [command.callback.__name__ for command in cli.app.registered_commands]
    for name in commands:
        assert f"\n## {name}\n" in page
        assert f"keras-compress {name}" in page
    assert set(re.findall(r"^## (\w+)$", page, re.MULTILINE)) == set(commands)


def test_snippets_are_there():
    lines = [line for page in DOCS.glob("*.md") for line in page.read_text().splitlines()]
    snippets = [line for line in lines if re.match(r"--8\W", line)]
    assert len(snippets) >= 6
    for line in snippets:
        path, section = re.fullmatch(r'--8<-- "([\w./]+)(?::(\w+))?"', line).groups()
        text = (DOCS.parent / path).read_text()
        marks = [] if section is None else [f"--8<-- [{end}:{section}]" for end in ("start", "end")]
        assert all(mark in text for mark in marks)
