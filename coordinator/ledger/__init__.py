"""What a run cost its devices: joules, seconds and bytes by device, round and stage."""
