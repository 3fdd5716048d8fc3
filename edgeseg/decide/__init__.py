"""From measured rows to a decision: requirements, the Pareto front, which engine to deploy."""
