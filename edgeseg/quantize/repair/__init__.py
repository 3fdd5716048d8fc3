"""What makes a float graph lose less in INT8 before any layer gives INT8 up; each repair leaves the float graph's results."""
