"""The machine at hand: CPU, GPU, power, state, and processes that end with their parent."""
