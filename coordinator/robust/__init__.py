"""What a round does with updates before a strategy absorbs them: judged, clipped, combined."""
