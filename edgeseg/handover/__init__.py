"""An engine as other hosts take it: folders that are complete, hashed, and say how they are started."""
