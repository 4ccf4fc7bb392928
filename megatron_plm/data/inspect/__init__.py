"""Looking into a dataset: what it holds, whether it is whole."""
