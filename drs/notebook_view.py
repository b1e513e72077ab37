"""What notebooks/figures.ipynb shows of a study: the parts of its report, figures redrawn, and README's tables."""

from pathlib import Path

from IPython.display import Image, Markdown, display
from joblib import cpu_count

from drs.figure_plan import plan_figures
from drs.html_report import write_html
from drs.readme import BLOCKS
from drs.report import draw_figures, read_provenance, read_tables, report_sections, write_report

WIDTH = 900
"""Width of a figure on the page, in pixels."""


class StudyView:
    """A study's tables and figures, one part at a time. Nothing but ``tables/`` and ``provenance.json`` is read.

    Args:
        study_dir: The study's folder. All of its figures are drawn anew into its ``figures/``.

    Raises:
        UserError: If the study has no tables or its provenance cannot be read.
    """

    def __init__(self, study_dir: str | Path) -> None:
        self.study_dir = Path(study_dir)
        tables = read_tables(self.study_dir)
        self._sections = {part.title: part for part in report_sections(tables, read_provenance(self.study_dir))}
        self._figures = plan_figures(tables)
        draw_figures(self.study_dir, workers=cpu_count())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.study_dir)!r})"

    @property
    def titles(self) -> list[str]:
        """The parts of the report, in order."""
        return list(self._sections)

    def show(self, title: str) -> None:
        """Show a part of the report with its figures; ``KeyError`` if the report has no such part."""
        section = self._sections[title]
        display(Markdown(section.body))
        for kind in section.kinds:
            names = [figure.name for figure in self._figures if figure.kind == kind]
            for name in names:
                display(Image(filename=str(self.study_dir / "figures" / f"{name}.png"), width=WIDTH))
            if not names:
                display(Markdown(f"*The tables of this study do not allow the figure {kind}.*"))

    def show_readme(self, block: str) -> None:
        """Show a part of README.md that comes from tables, as this study has it; ``KeyError`` for any other name."""
        display(Markdown(BLOCKS[block](self.study_dir)))

    def write_reports(self) -> list[Path]:
        """Write REPORT.md and report.html with the figures as they are now; return the two paths."""
        return [write_report(self.study_dir), write_html(self.study_dir)]
