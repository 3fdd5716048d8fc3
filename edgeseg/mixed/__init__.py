"""Mixed precision: what INT8 of each module loses and saves, and the search for the fastest mix that loses little enough."""
