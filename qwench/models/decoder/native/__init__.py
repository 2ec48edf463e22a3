"""Kernels in C++ for a decoder on a CPU."""
