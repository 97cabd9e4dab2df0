"""Text on disk: the documents in files, their token shards, and the practice corpus."""
