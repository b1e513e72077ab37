"""Train one model, or with -m or an experiment a whole grid of them; hydra/launcher=joblib trains several at a time.

python scripts/train.py data=mnist model=lenet loss=dr_softmax loss.weight=0.005 seed=0 study=NAME
python scripts/train.py experiment=smoke
python scripts/train.py experiment=laptop hydra/launcher=joblib hydra.launcher.n_jobs=2
"""

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from drs.config import train_config
from drs.entrypoint import report_mistakes, run_entrypoint
from drs.jobs import run_job


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
@report_mistakes
def main(config: DictConfig) -> object:
    """Train the model that the config describes."""
    typed = train_config(config)
    in_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    result = run_job(typed, in_sweep=in_sweep)
    # In a sweep the line of the last epoch is enough for a training that went well.
    if result.state != "done" or not typed.progress or not in_sweep:
        print(f"{result.state}: run {result.run_id} ({result.detail}) in {result.folder}", flush=True)
    return result


if __name__ == "__main__":
    run_entrypoint(main)
