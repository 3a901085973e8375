"""Data: tokenizers, token shards, the loader that maps a step to a batch, and the commands that prepare data."""
