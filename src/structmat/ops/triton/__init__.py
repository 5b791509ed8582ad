"""Triton kernels, one file per structure: plain functions on contiguous tensors; they know nothing of torch.library.

Every function takes tensors of one dtype (float16, bfloat16 or float32), accumulates in float32 and returns tensors
that it has filled to the last entry. ``products`` holds the batched product that most of them are made of, ``tuning``
what decides how a kernel is launched. Importing this package alone does not import triton; importing a module of it
does.
"""
