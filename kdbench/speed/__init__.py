"""What makes training steps faster without changing their results, and what measures them.

CUDA graphs, the teacher cache, concurrent runs in one process, profiling. Everything here can be left out."""
