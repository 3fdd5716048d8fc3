"""Many combinations of architecture, encoder, size, precision and target: built, measured in turns, one report."""
