"""Griffe extension: shows the doctests of docstrings as code."""

import re

import griffe

DOCTEST = re.compile(r"^>>> .*\n?(?:^\S.*\n?)*", re.MULTILINE)


class Doctests(griffe.Extension):
    """Puts every block that starts with `>>>`, up to the next blank line, into a code fence."""

    def on_instance(self, *, obj, **kwargs):
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = DOCTEST.sub(
                lambda block: f"\n```pycon\n{block[0].rstrip()}\n```\n", obj.docstring.value
            )
