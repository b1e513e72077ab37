"""Distribution-restrained softmax loss: training, attacks and the study of what it does for robustness."""

__version__ = "0.1.0"
