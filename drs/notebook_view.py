"""What notebooks/figures.ipynb shows of a study: the parts of its report, figures redrawn, and README's tables."""

import base64
import os
from dataclasses import dataclass
from html import escape
from pathlib import Path

import mistune

from drs.figure_plan import plan_figures
from drs.html_report import write_html
from drs.readme import BLOCKS
from drs.report import draw_figures, read_provenance, read_tables, report_sections, write_report

WIDTH = 900
"""Width of a figure on the page, in pixels."""


@dataclass(frozen=True, repr=False)
class Page:
    """What a notebook shows below a cell, in HTML."""

    html: str

    def _repr_html_(self) -> str:
        return self.html


class StudyView:
    """A study's tables and figures, one part at a time. Nothing but ``tables/`` and ``provenance.json`` is read.

    Args:
        study_dir: The study's folder. All of its figures are drawn anew into its ``figures/``, on all cores.

    Raises:
        UserError: If the study has no tables or its provenance cannot be read.
    """

    def __init__(self, study_dir: str | Path) -> None:
        self.study_dir = Path(study_dir)
        tables = read_tables(self.study_dir)
        self._sections = {part.title: part for part in report_sections(tables, read_provenance(self.study_dir))}
        self._figures = plan_figures(tables)
        draw_figures(self.study_dir, workers=os.cpu_count() or 1)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.study_dir)!r})"

    def show(self, title: str) -> Page:
        """Return a part of the report with its figures; ``KeyError`` if the report has no such part."""
        section = self._sections[title]
        parts = [_html(section.body)]
        for kind in section.kinds:
            shown = [figure for figure in self._figures if figure.kind == kind]
            parts += [self._image(figure.name, figure.title) for figure in shown]
            if not shown:
                parts.append(_html(f"*The tables of this study do not allow the figure {kind}.*"))
        return Page("\n".join(parts))

    def show_readme(self, block: str) -> Page:
        """Return a part of README.md that comes from tables, as this study has it; ``KeyError`` for any other name."""
        return Page(_html(BLOCKS[block](self.study_dir)))

    def write_reports(self) -> list[Path]:
        """Write REPORT.md and report.html with the figures as they are now; return the two paths."""
        return [write_report(self.study_dir, list(self._sections.values())), write_html(self.study_dir)]

    def _image(self, name: str, title: str) -> str:
        content = base64.b64encode((self.study_dir / "figures" / f"{name}.png").read_bytes()).decode()
        return f'<img alt="{escape(title)}" width="{WIDTH}" src="data:image/png;base64,{content}">'


def _html(markdown: str) -> str:
    return str(mistune.create_markdown(escape=False, plugins=["table"])(markdown))
