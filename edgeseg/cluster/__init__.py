"""Images by the million, in folders or buckets, on the machines of a Ray cluster: a plan, a ledger, workers."""
