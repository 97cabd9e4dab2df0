"""Text on disk: documents of files, the shards made of them, and the practice corpus."""
