"""Evaluation of checkpoints: benchmarks, perplexity and text generation. Most files are commands too."""
