"""Attack every finished run of a study, then write its tables, figures, REPORT.md and report.html.

python scripts/evaluate.py study=NAME suite=paper
python scripts/evaluate.py experiment=smoke
"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from drs.config import evaluate_config
from drs.entrypoint import report_mistakes, run_entrypoint
from drs.interrupts import whole_imports


@hydra.main(version_base="1.3", config_path="../configs", config_name="evaluate")
@report_mistakes
def main(config: DictConfig) -> None:
    """Evaluate the study that the config names."""
    typed = evaluate_config(config)
    # Imported late: torch is not needed to refuse a config.
    with whole_imports():
        from drs.evaluation import evaluate_study
        from drs.html_report import write_html
        from drs.report import draw_figures, write_report
        from drs.run_failures import end_with_failures
        from drs.study import is_current, mark_current, only_writer, write_study
        from drs.tracking import log_evaluation

    evaluation = evaluate_study(typed)
    if evaluation.cells and not is_current(evaluation, typed):
        with only_writer(evaluation.folder):
            if not is_current(evaluation, typed):  # by now another evaluation may have written it all
                evaluation = write_study(evaluation, typed)
                if typed.report:
                    figures = draw_figures(evaluation.folder)
                    write_report(evaluation.folder)
                    write_html(evaluation.folder)
                    mark_current(evaluation, typed)
                    print(f"{len(figures)} figure files in {evaluation.folder / 'figures'}", flush=True)
    elif evaluation.cells:
        print("nothing has changed", flush=True)
    if evaluation.cells and not typed.report:
        print(f"the tables are in {evaluation.folder / 'tables'}; report=true adds figures and report", flush=True)
    elif evaluation.cells:
        print(f"the report is {evaluation.folder / 'REPORT.md'}, for a browser report.html beside it", flush=True)
        log_evaluation(typed.tracking, evaluation.folder)
    end_with_failures(evaluation.failures)


if __name__ == "__main__":
    run_entrypoint(main)
