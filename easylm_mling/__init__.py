"""easylm_mling: continue the pretraining of Gemma on your own languages, on TPU pods."""

__version__ = "0.1.0"
