"""What an engine loses: data sets, meters, the judge, intervals over images."""
