"""Triton kernels of honeytrace, installed as the package ``honeytrace.kernels``."""
