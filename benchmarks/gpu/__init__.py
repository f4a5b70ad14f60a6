"""Measurements on a GPU, in parts of less than ten minutes: `make gpu-check`."""
