"""Helpers of several test modules: building and running recipes, simulated kills and CUDA graphs, processes under
torchrun, parts of a test plug-in, and reference implementations of terms. Fixtures of one folder stay in its conftest.
"""
