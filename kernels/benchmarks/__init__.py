"""Speed of the ops, measured once they have been shown to be right.

`python -m hf_memory.kernels.benchmarks.run --help`
"""
