"""Radiographs and where they come from: files, public data sets, drawn phantoms. Knows no models."""
