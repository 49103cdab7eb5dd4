"""Profiles, data sets, image files, public weights, WordNet, many processes."""
