"""Multi-node fine-tuning of large language models with Ray Train and DeepSpeed."""

__version__ = "0.1.0"
