"""What notebooks/figures.ipynb shows of a study: the parts of its report, figures redrawn, and README's tables."""

from pathlib import Path

from IPython.display import Image, Markdown, display

from drs.figure_plan import KINDS
from drs.html_report import write_html
from drs.readme import BLOCKS
from drs.report import draw_figures, read_provenance, read_tables, report_sections, write_report

WIDTH = 900
"""Width of a figure on the page, in pixels."""


class StudyView:
    """A study's tables and figures, one part at a time. Nothing but ``tables/`` and ``provenance.json`` is read.

    Args:
        study_dir: The study's folder. Figures are written into its ``figures/``.

    Raises:
        UserError: If the study has no tables or its provenance cannot be read.
    """

    def __init__(self, study_dir: str | Path) -> None:
        self.study_dir = Path(study_dir)
        sections = report_sections(read_tables(self.study_dir), read_provenance(self.study_dir))
        self._sections = {section.title: section for section in sections}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.study_dir)!r})"

    @property
    def titles(self) -> list[str]:
        """The parts of the report, in order."""
        return list(self._sections)

    def show(self, title: str) -> None:
        """Show a part of the report with its figures, drawn anew; ``KeyError`` if the report has no such part."""
        section = self._sections[title]
        display(Markdown(section.body))
        for kind in section.kinds:
            self._draw(kind)

    def show_readme(self, block: str) -> None:
        """Show a part of README.md that comes from tables, as this study has it; ``KeyError`` for any other name."""
        display(Markdown(BLOCKS[block](self.study_dir)))

    def write_reports(self) -> list[Path]:
        """Write REPORT.md and report.html with the figures as they are now; return the two paths."""
        return [write_report(self.study_dir), write_html(self.study_dir)]

    def _draw(self, kind: str) -> None:
        assert kind in KINDS
        pictures = [path for path in draw_figures(self.study_dir, kind) if path.suffix == ".png"]
        for path in pictures:
            display(Image(filename=str(path), width=WIDTH))
        if not pictures:
            text = f"*The tables of this study do not allow the figure {kind}.*"
            display(Markdown(text))
