"""Tokens: assets, tokenizer, shards, and the loader that turns a step into a batch. Knows nothing of ranks."""
