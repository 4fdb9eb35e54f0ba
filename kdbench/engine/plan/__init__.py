"""Planning of a stage before training: shape inference, a dry run of one step, and requirements on the data.

Shape inference and the dry run use meta tensors, which have shapes but no memory.
"""
