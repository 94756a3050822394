"""The page of a report: one file that asks for nothing else."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
:root { color-scheme: light; }
body { font: 1rem/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { line-height: 1.2; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; }
figcaption, caption { color: #444; text-align: left; padding: .3rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; text-align: left; vertical-align: top;
         border-bottom: 1px solid #ddd; }
td.number, th.number { text-align: right; white-space: nowrap;
                       font-variant-numeric: tabular-nums; }
td.text { overflow-wrap: anywhere; white-space: pre-wrap; min-width: 14rem; }
"""
# The page needs no network, and says so to the browser.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a heading for each column.

    Attributes:
        caption: what the rows are.
        headings: of the columns.
        rows: what they say; numbers come as text, ready to be read.
        texts: the columns that hold text of the corpus; the others hold numbers.
    """

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: frozenset[int] = frozenset()

    def html(self) -> str:
        """As a table element; the first column's cells are headings of their rows."""
        columns = range(len(self.headings))
        kinds = ["text" if column in self.texts else "number" for column in columns]
        headings = "".join(
            f'<th scope="col" class="{kind}">{escape(heading)}</th>'
            for kind, heading in zip(kinds, self.headings, strict=True)
        )
        rows = "\n".join(f"<tr>{self._row(row, kinds)}</tr>" for row in self.rows)
        # A table that scrolls must be reachable without a mouse.
        return (
            f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(self.caption)}">\n'
            f"<table><caption>{escape(self.caption)}</caption>\n"
            f"<thead><tr>{headings}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
        )

    @staticmethod
    def _row(row: Sequence[str], kinds: Sequence[str]) -> str:
        first, *others = row
        cells = [f'<th scope="row" class="{kinds[0]}">{escape(first)}</th>']
        for kind, cell in zip(kinds[1:], others, strict=True):
            # Corpora are of any script.
            direction = ' dir="auto"' if kind == "text" else ""
            cells.append(f'<td class="{kind}"{direction}>{escape(cell)}</td>')
        return "".join(cells)


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG with what it shows in words.

    Attributes:
        png: the file's bytes.
        description: what somebody who does not see it needs to know.
        caption: what stands below it.
    """

    png: bytes
    description: str
    caption: str

    def html(self) -> str:
        """As a figure element with the picture inside."""
        data = base64.b64encode(self.png).decode()
        return (
            f'<figure><img alt="{escape(self.description)}" src="data:image/png;base64,{data}">\n'
            f"<figcaption>{escape(self.caption)}</figcaption></figure>"
        )


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what is below it."""

    heading: str
    parts: Sequence[Table | Picture]

    def html(self) -> str:
        """As a section element."""
        parts = "\n".join(part.html() for part in self.parts)
        return f"<section>\n<h2>{escape(self.heading)}</h2>\n{parts}\n</section>"


def page(title: str, sections: Sequence[Section]) -> str:
    """The whole HTML document."""
    body = "\n".join(section.html() for section in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{body}
</main>
</body>
</html>
"""
