"""What the coordinator remembers: rows about rounds, blobs by their SHA-256."""
