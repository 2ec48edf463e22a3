"""Pieces of a decoder layer that trainer and engine share."""
