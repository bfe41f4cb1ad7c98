"""How results are shown: as a rich table in a terminal, as HTML in a notebook, as text in a log."""

import io

from rich.console import Console

WIDTH = 140  # columns of the plain-text form


class Rendered:
    """Mixin of results with a `renderable()`: printable everywhere."""

    def renderable(self):
        """Return the rich renderable that shows the result."""
        raise NotImplementedError

    def __rich__(self):
        return self.renderable()

    def __str__(self):
        console = Console(file=io.StringIO(), width=WIDTH, color_system=None, force_jupyter=False)
        console.print(self.renderable())
        return console.file.getvalue()

    def _repr_html_(self):
        console = Console(file=io.StringIO(), width=WIDTH, record=True, force_jupyter=False)
        console.print(self.renderable())
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
