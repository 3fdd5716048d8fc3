"""How long an engine takes: protocol, statistics, stages, streams, profile."""
