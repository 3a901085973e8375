"""The pipeline from text to token shards."""
