"""`sluice annotate`: judges a data set, on a cluster, and writes a row for each image."""
